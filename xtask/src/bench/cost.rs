//! What a TCP connection end costs in processor time, by the kernel's own statistics of each program.

use anyhow::Result;

use super::{
    kernel::{self, Program, Statistics},
    load::Place,
    sections::{Bench, INTERVAL, PATIENCE, Reads, cpu_seconds},
    table::{Document, Row, thousands},
};

/// Half of the kernel's limit of one million.
const MOST_VERIFIED_INSNS: u32 = 500_000;

/// CPU of agent and programs, in runs of their own since the statistics cost too.
pub(super) fn cost(bench: &Bench, document: &mut Document) -> Result<()> {
    for reads in [Reads::Netflow, Reads::Default] {
        measure(bench, document, reads)?;
    }
    Ok(())
}

fn measure(bench: &Bench, document: &mut Document, reads: Reads) -> Result<()> {
    let before: Vec<u32> = kernel::programs()?.into_keys().collect();
    let statistics = Statistics::enable()?;
    let agent = bench.start_agent_with(Place::Veth, reads.arguments())?;
    let idle = cpu_seconds(agent.pid())?;
    let done = bench.loads.churn(Place::Veth, bench.effort().run)?;
    // Two flushes, so that what the load left behind is part of the cost.
    std::thread::sleep(INTERVAL * 2);
    let agent_seconds = cpu_seconds(agent.pid())? - idle;
    let programs = kernel::programs()?;
    agent.stop(PATIENCE)?;
    let nothing = kernel::cost_of_nothing(&statistics)?;
    drop(statistics);
    let own = programs
        .into_iter()
        .filter(|(id, _)| !before.contains(id))
        .map(|(_, program)| program);
    let mut own: Vec<Program> = own.collect();
    own.sort_by_key(|program| std::cmp::Reverse(program.run_time_ns));

    let ends = done.clients.connections as f64 * 2.0;
    let (measured, runs) = own.iter().fold((0, 0), |(ns, runs), program| {
        (ns + program.run_time_ns, runs + program.runs)
    });
    let statistics_us = nothing * runs as f64 / 1e3 / ends;
    let kernel_us = measured as f64 / 1e3 / ends - statistics_us;
    let agent_us = agent_seconds * 1e6 / ends;
    document.row(Row {
        what: format!("CPU per TCP connection end{}", reads.title()),
        measured: format!(
            "{:.2} us: agent {agent_us:.2}, kernel programs {kernel_us:.2} ({} ends, {:.1} runs each; {nothing:.0} ns of a \
             run, {statistics_us:.2} us in all, are what an empty program takes: the statistics themselves)",
            agent_us + kernel_us,
            thousands(ends),
            runs as f64 / ends
        ),
        target: "<= 2 us".to_owned(),
        met: agent_us + kernel_us <= 2.0,
    });
    let most = own.iter().map(|program| program.verified_insns).max().unwrap_or(0);
    document.row(Row {
        what: format!("Largest number of verified instructions{}", reads.title()),
        measured: most.to_string(),
        target: format!("<= {MOST_VERIFIED_INSNS}"),
        met: most > 0 && most <= MOST_VERIFIED_INSNS,
    });
    let mut text = format!(
        "{:16} {:>12} {:>10} {:>15}",
        "program", "runs", "ns/run", "verified insns"
    );
    for program in &own {
        let each = program.run_time_ns as f64 / program.runs.max(1) as f64;
        text.push_str(&format!(
            "\n{:16} {:>12} {each:>10.0} {:>15}",
            program.name, program.runs, program.verified_insns
        ));
    }
    document.text(
        &format!(
            "Kernel programs during TCP churn{} (as the statistics have it)",
            reads.title()
        ),
        &text,
    );
    Ok(())
}
