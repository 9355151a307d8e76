use std::net::IpAddr;

use super::super::{Domains, DomainsOptions};

const SECOND: u64 = 1_000_000_000;

fn ip(n: u8) -> IpAddr {
    [192, 0, 2, n].into()
}

fn domains(max: usize) -> Domains<u32> {
    Domains::new(DomainsOptions {
        least_ns: 2 * SECOND,
        most_ns: 100 * SECOND,
        max,
    })
}

fn name(domains: &Domains<u32>, client: u32, ip: IpAddr, at_ns: u64) -> Option<String> {
    domains.name(client, ip, at_ns).map(ToString::to_string)
}

#[test]
fn a_name_is_used_from_the_answer_until_its_time_is_over() {
    let mut domains = domains(100);
    domains.learn(1, "a.example", ip(1), 10, 5 * SECOND);
    let at = |at| name(&domains, 1, ip(1), at);
    assert_eq!(at(5 * SECOND - 1), None);
    assert_eq!(at(5 * SECOND).as_deref(), Some("a.example"));
    assert_eq!(at(15 * SECOND - 1).as_deref(), Some("a.example"));
    assert_eq!(at(15 * SECOND), None);
    // Another client did not see this answer; nor is another address meant.
    assert_eq!(name(&domains, 2, ip(1), 6 * SECOND), None);
    assert_eq!(name(&domains, 1, ip(2), 6 * SECOND), None);
}

#[test]
fn times_to_live_have_bounds_of_our_own() {
    let mut domains = domains(100);
    domains.learn(1, "zero.example", ip(1), 0, 0);
    domains.learn(1, "ever.example", ip(2), u32::MAX, 0);
    assert!(name(&domains, 1, ip(1), 2 * SECOND - 1).is_some());
    assert_eq!(name(&domains, 1, ip(1), 2 * SECOND), None);
    assert!(name(&domains, 1, ip(2), 100 * SECOND - 1).is_some());
    assert_eq!(name(&domains, 1, ip(2), 100 * SECOND), None);
}

#[test]
fn of_several_names_the_last_told_before_counts() {
    let mut domains = domains(100);
    domains.learn(1, "a.example", ip(1), 50, SECOND);
    domains.learn(1, "b.example", ip(1), 50, 10 * SECOND);
    domains.learn(1, "b.example", ip(1), 50, 20 * SECOND);
    assert_eq!(name(&domains, 1, ip(1), 5 * SECOND).as_deref(), Some("a.example"));
    assert_eq!(name(&domains, 1, ip(1), 15 * SECOND).as_deref(), Some("b.example"));
    assert_eq!(name(&domains, 1, ip(1), 21 * SECOND).as_deref(), Some("b.example"));
    assert_eq!(domains.len(), 1);
}

#[test]
fn room_is_bounded_and_what_is_asked_for_again_stays() {
    let mut domains = domains(64);
    for n in 0..=255 {
        domains.learn(1, &format!("{n}.example"), ip(n), 90, u64::from(n));
        domains.learn(1, "often.example", ip(255), 90, u64::from(n));
        assert!(
            domains.len() <= 64 && domains.texts.len() <= 2 * 64,
            "{}",
            domains.len()
        );
    }
    assert_eq!(name(&domains, 1, ip(255), 256).as_deref(), Some("often.example"));
    assert_eq!(name(&domains, 1, ip(254), 256).as_deref(), Some("254.example"));
    assert_eq!(name(&domains, 1, ip(0), 256), None);
    assert!(domains.take_forgotten() > 100);
    assert_eq!(domains.take_forgotten(), 0);
    // One whose time is over is no loss.
    for n in 0..=255 {
        domains.learn(2, "late.example", ip(n), 0, 1_000 * SECOND);
    }
    assert!(domains.take_forgotten() < 256);
}
