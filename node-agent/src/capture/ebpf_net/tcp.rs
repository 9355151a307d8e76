//! TCP on the user side: aggregated closes, and connections that outlive an interval.
//!
//! A connection that opens and closes between two samples never shows up here one by one: the kernel side sums it by
//! flow. One that is open at the end of an interval gets a slot; from then on its counters are absolute and this module
//! takes differences, until its close arrives as an event with the same slot.

use std::time::Duration;

use ahash::RandomState;
use ebpf_common::net::{
    Conn, FlowKey, SAMPLES_PER_RUN, Sample, SampleBlock, TcpAgg, TcpCloseEvent, TcpCounters, Tuple, direction, sample,
};
use ebpf_programs::net::{guess_direction, state};
use hashbrown::HashMap;

use super::rows::{Origin, Row, Rows};
use crate::{
    capture::ends::{Ends, Whose},
    ebpf::{
        net::NetObject,
        sys::{Batches, monotonic_ns, thread_cpu},
    },
    identity::process::Comm,
};

/// Connections read per system call.
const BATCH: usize = 4096;
/// A connection that no process is seen to hold is reported without one after this long.
const PATIENCE_NS: u64 = 10_000_000_000;
/// See [`Tracker::settle_ns`].
const SETTLE_NS: u64 = 250_000_000;

/// Connections that have been sampled at least once.
pub(super) struct Tracker {
    slots: Vec<Slot>,
    free: Vec<u32>,
    batches: Batches<u64, Conn>,
    block: Box<SampleBlock>,
    /// The connection of each entry of `block`.
    pending: Vec<(u32, Conn)>,
    /// Contributions of connections whose owner is not known yet: slot, and what to add.
    unnamed: Vec<(u32, Row)>,
    /// CPU time of this pass inside system calls.
    kernel_cpu: Duration,
    /// A new connection younger than this waits for its close or the next sample, nanoseconds: a server may be about to
    /// fork and execute the program that serves it.
    settle_ns: u64,
    pass: u32,
}

/// One open connection.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    /// [`Conn::id`]; 0 while the slot is free.
    id: u64,
    inode: u64,
    last: TcpCounters,
    key: FlowKey,
    comm: Comm,
    /// Cgroup of the owner, 0 if not known.
    cgroup: u64,
    /// Owner as the kernel side knows it; a different `key.pid` was found by the descriptor scan.
    kernel_pid: u32,
    /// Process that accepted it and then forked, 0 if none did.
    forker_pid: u32,
    /// Time of establishment, monotonic nanoseconds.
    established_ns: u64,
    seen: u32,
}

/// What one pass over the open connections found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct SampleReport {
    /// Connections open.
    pub open: u64,
    /// Entries whose close was never seen (the hook was busy on that CPU); they were ended now.
    pub missed_close: u64,
    /// Slots whose close event was lost.
    pub vanished: u64,
    /// CPU time spent inside system calls: the kernel's part.
    pub kernel_cpu: Duration,
}

impl Tracker {
    /// Nothing tracked yet.
    #[must_use]
    pub(super) fn new() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            batches: Batches::read(BATCH),
            block: Box::default(),
            pending: Vec::with_capacity(SAMPLES_PER_RUN),
            unnamed: Vec::new(),
            kernel_cpu: Duration::ZERO,
            settle_ns: SETTLE_NS,
            pass: 0,
        }
    }

    /// Adds what the kernel side summed for one flow.
    pub(super) fn add_aggregate(&self, key: &FlowKey, agg: &TcpAgg, rows: &mut Rows) {
        rows.add(
            &tcp(*key, agg.cgroup),
            &Row {
                first_ns: agg.first_ns,
                last_ns: monotonic_ns(),
                read: agg.read,
                written: agg.written,
                retransmits: agg.retransmits,
                rtt_sum_us: agg.rtt_sum_us,
                rtt_var_sum_us: agg.rtt_var_sum_us,
                rtt_count: agg.closed,
                closed: agg.closed,
                established: agg.established,
                comm: agg.comm,
                ..Row::default()
            },
        );
    }

    /// Adds the close of a connection that was sampled before.
    pub(super) fn add_close(&mut self, event: &TcpCloseEvent, rows: &mut Rows) {
        let index = event.slot.wrapping_sub(1);
        let slot = self
            .slots
            .get(index as usize)
            .copied()
            .filter(|slot| slot.id == event.id && slot.id != 0);
        let mut key = event.key;
        let mut comm = event.comm;
        let mut cgroup = event.cgroup;
        let mut established = u64::from(event.adopted == 0);
        let mut since = 0;
        let mut last = TcpCounters::default();
        if let Some(slot) = slot {
            // The scan knows better than whoever accepted it; a process that closed it is named by the kernel side.
            if key.pid == 0 || (key.pid == slot.kernel_pid && slot.key.pid != slot.kernel_pid) {
                key.pid = slot.key.pid;
                comm = slot.comm;
                cgroup = slot.cgroup;
            } else if key.pid == slot.key.pid && cgroup == 0 {
                cgroup = slot.cgroup;
            }
            key.direction = slot.key.direction;
            established = 0;
            since = slot.established_ns;
            last = slot.last;
            self.release(index);
        }
        if key.direction == direction::UNKNOWN {
            key.direction = guess_direction(key.tuple.local_port, key.tuple.remote_port);
        }
        let since = if since == 0 { monotonic_ns() } else { since };
        let row = Row {
            closed: 1,
            established,
            comm,
            first_ns: since,
            last_ns: since,
            ..delta(&last, &event.counters)
        };
        rows.add(&tcp(key, cgroup), &row);
    }

    /// Samples every open connection and adds what changed since the last time.
    ///
    /// `listening` tells whether a local end belongs to a listener; it decides the direction of connections that are
    /// older than the agent.
    ///
    /// # Errors
    /// If the maps cannot be read or the sampling program cannot be run.
    pub(super) fn sample(
        &mut self,
        object: &mut NetObject,
        listening: &dyn Fn(&Tuple) -> bool,
        rows: &mut Rows,
    ) -> anyhow::Result<SampleReport> {
        let mut report = SampleReport::default();
        self.pass = self.pass.wrapping_add(1).max(1);
        self.batches.rewind();
        let mut stale = Vec::new();
        let now = monotonic_ns();
        // Taken out so that the batch can be walked while `self` changes.
        let mut batches = std::mem::replace(&mut self.batches, Batches::read(0));
        self.kernel_cpu = Duration::ZERO;
        loop {
            let before = thread_cpu();
            let batch = batches.next(object.map("CONNS")?)?;
            self.kernel_cpu += thread_cpu().saturating_sub(before);
            let Some(batch) = batch else { break };
            for (sk, conn) in batch.filter(|(_, conn)| conn.established_ns != 0 && conn.closing == 0) {
                report.open += 1;
                self.enqueue(*sk, conn);
                if self.pending.len() == SAMPLES_PER_RUN {
                    self.run(object, listening, now, rows, &mut stale)?;
                }
            }
        }
        self.batches = batches;
        self.run(object, listening, now, rows, &mut stale)?;
        for sk in stale {
            report.missed_close += u64::from(object.forget_connection(sk)?);
        }
        report.vanished = self.sweep();
        report.kernel_cpu = self.kernel_cpu;
        Ok(report)
    }

    /// From now on every connection is sampled, however young: there will be no next sample. Gives the age until which
    /// they were left out.
    pub(super) const fn sample_all(&mut self) -> u64 {
        std::mem::replace(&mut self.settle_ns, 0)
    }

    /// From now on connections younger than this, in nanoseconds, are left out again.
    pub(super) const fn settle(&mut self, settle_ns: u64) {
        self.settle_ns = settle_ns;
    }

    /// Stops tracking connections of what is switched off; returns how many there were. What closes just now is still
    /// reported by the kernel side, and left out there.
    ///
    /// # Errors
    /// If the map cannot be read or refuses.
    pub(super) fn evict(&mut self, object: &mut NetObject, ends: &mut Ends) -> anyhow::Result<u64> {
        let mut gone = Vec::new();
        self.batches.rewind();
        while let Some(batch) = self.batches.next(object.map("CONNS")?)? {
            for (sk, conn) in batch.filter(|(_, conn)| conn.closing == 0) {
                let index = conn.slot.wrapping_sub(1);
                let slot = self.slots.get(index as usize).filter(|slot| slot.id == conn.id);
                let (cgroup, pid, tuple) = match slot {
                    Some(slot) => (slot.cgroup, slot.key.pid, slot.key.tuple),
                    // Whose it is shows when it is accepted; the kernel side asks then.
                    None if conn.owner_pid == 0 => continue,
                    None => (conn.owner_cgroup, conn.owner_pid, Tuple::default()),
                };
                if ends.local(cgroup, pid, &tuple) == Whose::Off {
                    gone.push((*sk, slot.map(|_| index)));
                }
            }
        }
        let mut evicted = 0;
        for (sk, slot) in gone {
            evicted += u64::from(object.forget_connection(sk)?);
            slot.into_iter().for_each(|index| self.release(index));
        }
        Ok(evicted)
    }

    /// Adds what [`Self::sample`] held back until the owners were looked for. A new connection that still has none is
    /// left to its close or to the next interval.
    pub(super) fn add_unnamed(&mut self, rows: &mut Rows) {
        let now = monotonic_ns();
        for (index, part) in std::mem::take(&mut self.unnamed) {
            let Some(slot) = self.slots.get(index as usize) else {
                continue;
            };
            if slot.key.pid == 0 && part.established != 0 && now.saturating_sub(slot.established_ns) < PATIENCE_NS {
                self.release(index);
                continue;
            }
            let part = Row {
                comm: slot.comm,
                ..part
            };
            rows.add(&tcp(slot.key, slot.cgroup), &part);
        }
    }

    /// Replaces owners by who holds the descriptor now; `holder(inode, owner)` gives the process to name, if another.
    pub(super) fn update_owners(&mut self, mut holder: impl FnMut(u64, u32) -> Option<(u32, Comm)>) {
        let now = monotonic_ns();
        for slot in self.slots.iter_mut().filter(|slot| slot.id != 0 && slot.inode != 0) {
            if let Some((pid, comm)) = holder(slot.inode, slot.key.pid) {
                // Its child was quicker than its own close after the fork.
                if pid == slot.forker_pid && now.saturating_sub(slot.established_ns) < PATIENCE_NS {
                    continue;
                }
                slot.key.pid = pid;
                slot.comm = comm;
                // The new owner's is found by its process.
                slot.cgroup = 0;
            }
        }
    }

    fn enqueue(&mut self, sk: u64, conn: &Conn) {
        let known = conn
            .slot
            .checked_sub(1)
            .and_then(|i| Some((i, self.slots.get(i as usize)?)));
        let (index, fresh) = match known {
            Some((index, slot)) if slot.id == conn.id => (index, slot.inode == 0),
            _ => (self.allocate(), true),
        };
        let position = self.pending.len();
        if let Some(entry) = self.block.samples.get_mut(position) {
            *entry = Sample {
                sk,
                id: conn.id,
                slot: index + 1,
                flags: if fresh { sample::WANT_IDENTITY } else { 0 },
                ..Sample::default()
            };
            self.pending.push((index, *conn));
        }
    }

    fn run(
        &mut self,
        object: &mut NetObject,
        listening: &dyn Fn(&Tuple) -> bool,
        now: u64,
        rows: &mut Rows,
        stale: &mut Vec<u64>,
    ) -> anyhow::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        self.block.count = self.pending.len() as u64;
        let before = thread_cpu();
        object.sample(&mut self.block)?;
        self.kernel_cpu += thread_cpu().saturating_sub(before);
        let pending = std::mem::take(&mut self.pending);
        for ((index, conn), sampled) in pending.iter().zip(&self.block.samples) {
            let Some(slot) = self.slots.get_mut(*index as usize) else {
                continue;
            };
            let fresh = slot.id != conn.id;
            if sampled.flags & sample::VALID == 0 {
                // Closing: the close itself tells the rest, with or without this slot.
                if fresh {
                    self.free.push(*index);
                }
                continue;
            }
            // Its end was missed; what was counted up to its close stands.
            let ended = sampled.counters.state == state::CLOSE || sampled.counters.state == 0;
            if ended {
                stale.push(sampled.sk);
                if fresh && conn.closed_ns == 0 {
                    self.free.push(*index);
                    continue;
                }
            }
            if fresh && (sampled.tuple.local_port == 0 || sampled.tuple.remote_port == 0) {
                // Not a connection any more: the memory is another socket's.
                stale.push(sampled.sk);
                self.free.push(*index);
                continue;
            }
            let young = conn.adopted == 0 && now.saturating_sub(conn.established_ns) < self.settle_ns;
            if fresh && (young || is_waiting(conn, sampled, now)) {
                self.free.push(*index);
                continue;
            }
            let mut established = 0;
            if fresh {
                established = u64::from(conn.adopted == 0);
                *slot = new_slot(sampled, conn, listening);
            } else if slot.inode == 0 {
                slot.inode = sampled.inode;
            }
            if slot.key.pid == 0 && conn.owner_pid != 0 {
                slot.key.pid = conn.owner_pid;
                slot.kernel_pid = conn.owner_pid;
                slot.comm = conn.owner_comm;
                slot.cgroup = conn.owner_cgroup;
            }
            slot.forker_pid = conn.forker_pid;
            slot.seen = self.pass;
            let part = Row {
                established,
                closed: u64::from(ended),
                comm: slot.comm,
                // Its ends are who they were when it was established.
                first_ns: slot.established_ns,
                last_ns: slot.established_ns,
                ..if ended {
                    Row::default()
                } else {
                    delta(&slot.last, &sampled.counters)
                }
            };
            let changed = part.read | part.written | part.retransmits | part.established | part.closed != 0;
            if !ended {
                raise(&mut slot.last, &sampled.counters);
            }
            let key = slot.key;
            if ended {
                slot.id = 0;
                self.free.push(*index);
            } else if key.pid == 0 && changed {
                self.unnamed.push((*index, part));
                continue;
            }
            if changed {
                rows.add(&tcp(key, slot.cgroup), &part);
            }
        }
        self.pending = pending;
        self.pending.clear();
        Ok(())
    }

    fn allocate(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
        })
    }

    fn release(&mut self, index: u32) {
        if let Some(slot) = self.slots.get_mut(index as usize) {
            *slot = Slot::default();
            self.free.push(index);
        }
    }

    /// Frees slots that two passes in a row did not meet: their close event was lost.
    fn sweep(&mut self) -> u64 {
        let previous = self.pass.wrapping_sub(1);
        let mut vanished = 0;
        for (index, slot) in self.slots.iter_mut().enumerate() {
            if slot.id != 0 && slot.seen != self.pass && slot.seen != previous {
                *slot = Slot::default();
                self.free.push(u32::try_from(index).unwrap_or(u32::MAX));
                vanished += 1;
            }
        }
        vanished
    }
}

/// A contribution of TCP.
fn tcp(flow: FlowKey, cgroup: u64) -> Origin {
    Origin {
        flow,
        udp: false,
        cgroup,
    }
}

/// Not in the hands of a process yet: until it is accepted a connection has no owner to name.
fn is_waiting(conn: &Conn, sampled: &Sample, now: u64) -> bool {
    conn.owner_pid == 0
        && conn.adopted == 0
        && conn.direction == direction::INCOMING
        && sampled.inode == 0
        && now.saturating_sub(conn.established_ns) < PATIENCE_NS
}

fn new_slot(sampled: &Sample, conn: &Conn, listening: &dyn Fn(&Tuple) -> bool) -> Slot {
    let mut direction = conn.direction;
    if direction == direction::UNKNOWN {
        let Tuple {
            local_port,
            remote_port,
            ..
        } = sampled.tuple;
        // No listener any more: only a server has a privileged port facing an unprivileged one.
        let server = listening(&sampled.tuple) || (local_port < 1024 && remote_port >= 1024);
        direction = if server {
            direction::INCOMING
        } else {
            direction::OUTGOING
        };
    }
    Slot {
        id: conn.id,
        inode: sampled.inode,
        last: TcpCounters::default(),
        key: FlowKey {
            tuple: sampled.tuple,
            pid: conn.owner_pid,
            direction,
            ..FlowKey::default()
        },
        comm: conn.owner_comm,
        cgroup: conn.owner_cgroup,
        kernel_pid: conn.owner_pid,
        forker_pid: conn.forker_pid,
        established_ns: conn.established_ns,
        seen: 0,
    }
}

/// A reading taken while the connection was busy may be a little short, never too large: the highest one counts.
fn raise(last: &mut TcpCounters, now: &TcpCounters) {
    last.read = last.read.max(now.read);
    last.written = last.written.max(now.written);
    last.retransmits = last.retransmits.max(now.retransmits);
}

/// What happened between two absolute readings.
fn delta(last: &TcpCounters, now: &TcpCounters) -> Row {
    Row {
        read: now.read.saturating_sub(last.read),
        written: now.written.saturating_sub(last.written),
        retransmits: u64::from(now.retransmits.saturating_sub(last.retransmits)),
        rtt_sum_us: u64::from(now.rtt_us),
        rtt_var_sum_us: u64::from(now.rtt_var_us),
        rtt_count: 1,
        ..Row::default()
    }
}

/// Local ends that listen: (namespace, port), with the address they are bound to.
#[derive(Debug, Default)]
pub(super) struct Listeners {
    ports: HashMap<(u32, u16), Vec<[u8; 16]>, RandomState>,
}

impl Listeners {
    /// Notes a listening socket.
    pub(super) fn add(&mut self, tuple: &Tuple) {
        let bound = self.ports.entry((tuple.netns, tuple.local_port)).or_default();
        if !bound.contains(&tuple.local) {
            bound.push(tuple.local);
        }
    }

    /// True if a listener takes connections to this local end: same namespace and port, and its address or the
    /// unspecified one.
    #[must_use]
    pub(super) fn contains(&self, tuple: &Tuple) -> bool {
        const ANY_V4: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0];
        self.ports
            .get(&(tuple.netns, tuple.local_port))
            .is_some_and(|bound| bound.iter().any(|a| *a == [0; 16] || *a == ANY_V4 || *a == tuple.local))
    }
}
