//! The tests, against any cluster that a kubeconfig names.
//!
//! Data flow: [`run`] makes a [`world::World`], installs the chart, applies the object and takes the tests in their order; each
//! prints what it measured, and one that fails does not keep the others from running.
//!
//! - [`names`], [`nat`], [`requests`], [`encrypted`], [`lookups`], [`shells`], [`toggle`], [`churn`], [`faults`], [`cost`], [`removal`] are the tests;
//! - [`api`] asks the API server, [`stub`] reads what arrived at the DataWay stub, [`workloads`] makes manifests;
//! - [`truth`] says what the API says about the ends of flows.

pub mod api;
pub mod churn;
pub mod cost;
pub mod encrypted;
pub mod faults;
pub mod lookups;
pub mod names;
pub mod nat;
pub mod removal;
pub mod requests;
pub mod shells;
pub mod stub;
pub mod toggle;
pub mod truth;
pub mod workloads;
pub mod world;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::ValueEnum;
use world::{ALPHA, BETA, PRODUCT, SINK, World};

use crate::cluster::Cluster;

/// A test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Test {
    /// Every way that pods talk is named as the API says, and adds up
    Names,
    /// Where a dialled service really goes
    Nat,
    /// HTTP requests between pods
    Requests,
    /// The same in TLS
    Encrypted,
    /// DNS of pods
    Lookups,
    /// What is typed into shells of pods
    Shells,
    /// A namespace switched off and on
    Toggle,
    /// Two hundred pods that come and go
    Churn,
    /// Parts of the product and the API server taken away
    Faults,
    /// Nothing is written when nothing changed
    Cost,
    /// What ServiceAccounts may do
    Rights,
    /// Nothing stays
    Removal,
}

/// What to run.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Only these tests
    #[arg(long, value_enum, value_delimiter = ',')]
    pub only: Vec<Test>,
    /// How long the API server is away, seconds
    #[arg(long, default_value_t = 120)]
    pub outage: u64,
}

/// Runs the tests; tells at the end which failed.
///
/// # Errors
/// A test failed, or the product could not be installed.
pub async fn run(cluster: Cluster, dist: PathBuf, options: &Options) -> anyhow::Result<()> {
    let mut world = World::new(cluster, dist).await?;
    let without_chart = world.everything().await?;
    let start = Instant::now();
    world.install().await.context("install the chart")?;
    println!("    chart installed after {:.1} s", start.elapsed().as_secs_f64());
    let without_object = world.everything().await?;
    let object = world.object();
    println!("{}", serde_yaml::to_string(&object)?);
    api::apply(&world.client, &[object]).await?;
    let ready = world.wait_condition("Ready", "True", Duration::from_secs(120)).await;
    world.print_status("after apply").await;
    println!(
        "    {}",
        world
            .kubectl(&["get", "ebpfcollectors"])?
            .trim()
            .replace('\n', "\n    ")
    );
    println!(
        "    {}",
        world
            .kubectl(&["get", "pods", "-A", "-o", "wide"])?
            .trim()
            .replace('\n', "\n    ")
    );
    ready?;
    println!(
        "    ready {:.1} s after the chart's installation began",
        start.elapsed().as_secs_f64()
    );
    let mut outcomes = Vec::new();
    for test in Test::value_variants() {
        if !options.only.is_empty() && !options.only.contains(test) {
            continue;
        }
        println!("==> {test:?}");
        let start = Instant::now();
        let outcome = match test {
            Test::Names => names::run(&mut world).await,
            Test::Nat => nat::run(&mut world).await,
            Test::Requests => requests::run(&mut world).await,
            Test::Encrypted => encrypted::run(&mut world).await,
            Test::Lookups => lookups::run(&mut world).await,
            Test::Shells => shells::run(&mut world).await,
            Test::Toggle => toggle::run(&mut world).await,
            Test::Churn => churn::run(&mut world).await,
            Test::Faults => faults::run(&mut world, Duration::from_secs(options.outage)).await,
            Test::Cost => cost::run(&world).await,
            Test::Rights => cost::rights(&world).await,
            Test::Removal => removal::run(&world, &without_object, &without_chart).await,
        };
        if let Err(error) = &outcome {
            println!("    FAILED: {error:#}");
        }
        outcomes.push((test, start.elapsed(), outcome));
    }
    println!();
    for (test, took, outcome) in &outcomes {
        let word = if outcome.is_ok() { "PASSED" } else { "FAILED" };
        println!("{:<8} {:>5.0} s  {word}", format!("{test:?}"), took.as_secs_f64());
    }
    let failed = outcomes.iter().filter(|(_, _, outcome)| outcome.is_err()).count();
    anyhow::ensure!(failed == 0, "{failed} of {} tests failed", outcomes.len());
    Ok(())
}

/// Removes what tests and product left on a cluster that stays.
///
/// # Errors
/// Something would not go.
pub async fn clean(cluster: Cluster, dist: PathBuf) -> anyhow::Result<()> {
    let world = World::new(cluster, dist).await?;
    // Neither may be there.
    let _ = world.kubectl(&["delete", "ebpfcollectors", "--all", "--wait", "--timeout=60s"]);
    let _ = world.helm(&["uninstall", "ebpf-collector", "--namespace", PRODUCT, "--wait"]);
    for namespace in [PRODUCT, ALPHA, BETA, SINK] {
        api::remove_namespace(&world.client, namespace, Duration::from_secs(90)).await?;
    }
    Ok(())
}
