//! Chains are judged by webpki, the verifier that both ends use.

#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;

use rustls::pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject as _};
use webpki::{EndEntityCert, KeyUsage};

use super::*;

const HOUR: Duration = Duration::from_secs(3600);

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn start() -> Timestamp {
    at(1_800_000_000)
}

fn names() -> Vec<String> {
    vec![
        "cluster-aggregator.observe.svc".to_owned(),
        "cluster-aggregator".to_owned(),
    ]
}

fn fresh(now: Timestamp) -> Material {
    Material::plan(Existing::default(), &names(), &Policy::default(), now).unwrap()
}

fn existing(material: &Material) -> Existing {
    Existing {
        authority: Some(material.authority.clone()),
        aggregator: Some(material.aggregator.clone()),
        agent: Some(material.agent.clone()),
        operator: Some(material.operator.clone()),
    }
}

/// What a verifier with `bundle` says to `leaf`.
fn verify(leaf: &KeyedCertificate, bundle: &str, usage: KeyUsage, now: Timestamp) -> Result<(), String> {
    let roots: Vec<CertificateDer<'_>> = CertificateDer::pem_slice_iter(bundle.as_bytes())
        .collect::<Result<_, _>>()
        .unwrap();
    let anchors: Vec<_> = roots
        .iter()
        .map(|root| webpki::anchor_from_trusted_cert(root).unwrap())
        .collect();
    let leaf = CertificateDer::from_pem_slice(leaf.certificate.as_bytes()).unwrap();
    EndEntityCert::try_from(&leaf)
        .unwrap()
        .verify_for_usage(
            webpki::ALL_VERIFICATION_ALGS,
            &anchors,
            &[],
            UnixTime::since_unix_epoch(Duration::from_secs(now.as_second().try_into().unwrap())),
            usage,
            None,
            None,
        )
        .map(|_| ())
        .map_err(|error| error.to_string())
}

#[test]
fn each_end_trusts_the_other_and_nobody_else() {
    let now = start();
    let (ours, foreign) = (fresh(now), fresh(now));
    let bundle = ours.authority.bundle();
    verify(&ours.aggregator, &bundle, KeyUsage::server_auth(), now).unwrap();
    verify(&ours.agent, &bundle, KeyUsage::client_auth(), now).unwrap();
    verify(&ours.operator, &bundle, KeyUsage::client_auth(), now).unwrap();
    assert!(
        verify(&ours.agent, &bundle, KeyUsage::server_auth(), now).is_err(),
        "an agent is no server"
    );
    assert!(
        verify(&ours.aggregator, &bundle, KeyUsage::client_auth(), now).is_err(),
        "the aggregator is no client"
    );
    assert!(
        verify(&foreign.agent, &bundle, KeyUsage::client_auth(), now).is_err(),
        "another object's agent"
    );
    let leaf = CertificateDer::from_pem_slice(ours.aggregator.certificate.as_bytes()).unwrap();
    let leaf = EndEntityCert::try_from(&leaf).unwrap();
    for name in names() {
        leaf.verify_is_valid_for_subject_name(&ServerName::try_from(name).unwrap())
            .unwrap();
    }
    assert!(
        leaf.verify_is_valid_for_subject_name(&ServerName::try_from("other.observe.svc").unwrap())
            .is_err()
    );
}

#[test]
fn what_is_good_stays_to_the_byte() {
    let first = fresh(start());
    assert_eq!(first.changes.first(), Some(&Change::Founded));
    let later = start() + jiff::SignedDuration::from_hours(24 * 30);
    let second = Material::plan(existing(&first), &names(), &Policy::default(), later).unwrap();
    assert_eq!(second.changes, []);
    assert_eq!(
        (&second.aggregator, &second.agent, &second.operator),
        (&first.aggregator, &first.agent, &first.operator)
    );
    assert_eq!(second.authority, first.authority);
}

#[test]
fn what_is_damaged_or_foreign_is_replaced_and_nothing_else() {
    let (first, foreign) = (fresh(start()), fresh(start()));
    let plan = |change: &dyn Fn(&mut Existing), names: &[String]| {
        let mut existing = existing(&first);
        change(&mut existing);
        Material::plan(existing, names, &Policy::default(), start())
            .unwrap()
            .changes
    };
    let issued = |role| vec![Change::Issued(role)];
    assert_eq!(plan(&|e| e.agent = None, &names()), issued(Role::Agent));
    assert_eq!(
        plan(&|e| e.agent = Some(foreign.agent.clone()), &names()),
        issued(Role::Agent)
    );
    assert_eq!(
        plan(&|e| e.operator = Some(first.agent.clone()), &names()),
        issued(Role::Operator),
        "another's leaf"
    );
    assert_eq!(
        plan(
            &|e| e.agent.as_mut().unwrap().key.clone_from(&foreign.agent.key),
            &names()
        ),
        issued(Role::Agent),
        "a key that does not belong to the certificate"
    );
    assert_eq!(
        plan(
            &|e| e.aggregator.as_mut().unwrap().certificate = "nonsense".to_owned(),
            &names()
        ),
        issued(Role::Aggregator)
    );
    assert_eq!(plan(&|_| {}, &["another.name".to_owned()]), issued(Role::Aggregator));
    let founded = plan(&|e| e.authority.as_mut().unwrap().current.certificate.clear(), &names());
    assert_eq!(founded.len(), 4, "a new authority and three leaves: {founded:?}");
}

/// Three years in steps of six hours. Pods get what was written up to `LAG` steps late, each end at its own time: any leaf of the
/// last steps must be trusted by any bundle of the last steps.
#[test]
fn rotation_leaves_no_gap() {
    const LAG: usize = 3;
    const STEP: i64 = 6 * 3600;
    let policy = Policy::default();
    let mut now = start();
    let mut material = fresh(now);
    let mut written: VecDeque<Material> = VecDeque::from([material.clone()]);
    let (mut changes, mut checked) = (Vec::new(), 0);
    for _ in 0..3 * 365 * 4 {
        now = at(now.as_second() + STEP);
        let next = Material::plan(existing(&material), &names(), &policy, now).unwrap();
        let changed = !next.changes.is_empty();
        changes.extend(next.changes.clone());
        material = next;
        written.push_back(material.clone());
        if written.len() > LAG {
            written.pop_front();
        }
        let recent = written.iter().skip(1).any(|m| !m.changes.is_empty());
        if !(changed || recent || now.as_second() % (STEP * 24 * 7) < STEP) {
            continue;
        }
        let (oldest, newest) = (written.front().unwrap(), written.back().unwrap());
        for (leaf_of, bundle_of) in [(oldest, newest), (newest, oldest), (newest, newest), (oldest, oldest)] {
            let bundle = bundle_of.authority.bundle();
            verify(&leaf_of.aggregator, &bundle, KeyUsage::server_auth(), now).unwrap();
            verify(&leaf_of.agent, &bundle, KeyUsage::client_auth(), now).unwrap();
            verify(&leaf_of.operator, &bundle, KeyUsage::client_auth(), now).unwrap();
            checked += 3;
        }
        let left = inspect(&material.agent.certificate).unwrap().left(now);
        assert!(
            left > policy.leaf / 4,
            "a leaf was let come near its end: {left:?} left"
        );
    }
    let count = |change: &Change| changes.iter().filter(|c| *c == change).count();
    assert!(checked > 500, "{checked}");
    assert_eq!(count(&Change::Founded), 0, "never from scratch");
    assert!(count(&Change::Announced) >= 3);
    assert_eq!(count(&Change::Announced), count(&Change::Promoted));
    assert_eq!(count(&Change::Promoted), count(&Change::Retired));
    // A leaf lives 60 of its 90 days: 18 in three years, and one more per new authority.
    assert!(
        (18..=24).contains(&count(&Change::Issued(Role::Agent))),
        "{}",
        count(&Change::Issued(Role::Agent))
    );
}

/// An operator that was away for long must not take two steps at once when it is back.
#[test]
fn absence_does_not_shorten_a_step() {
    let policy = Policy::default();
    let first = fresh(start());
    let mut now = start() + jiff::SignedDuration::from_hours(24 * 300);
    let announced = Material::plan(existing(&first), &names(), &policy, now).unwrap();
    assert!(
        announced.changes.contains(&Change::Announced),
        "{:?}",
        announced.changes
    );
    now += jiff::SignedDuration::from_hours(24 * 20);
    let promoted = Material::plan(existing(&announced), &names(), &policy, now).unwrap();
    assert!(promoted.changes.contains(&Change::Promoted) && !promoted.changes.contains(&Change::Retired));
    now += jiff::SignedDuration::try_from(policy.overlap - HOUR).unwrap();
    let waiting = Material::plan(existing(&promoted), &names(), &policy, now).unwrap();
    assert_eq!(waiting.changes, [], "the old authority stays for the whole overlap");
    verify(
        &announced.agent,
        &waiting.authority.bundle(),
        KeyUsage::client_auth(),
        now,
    )
    .unwrap();
}

#[test]
fn keys_do_not_show_in_debug_output() {
    let text = format!("{:?}", fresh(start()));
    assert!(!text.contains("PRIVATE"), "{text}");
}
