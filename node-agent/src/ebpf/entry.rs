//! The way into the hooks of UDP for programs that read packets too: `ebpf-net` opens it, and programs of `dnsflow` and `httpflow`
//! enter. The kernel then runs one program per packet, and theirs only for what they want.
//!
//! Entry: [`Entry::enter_dns`], [`Entry::enter_http`]. Where it is not open, or the kernel refuses, they attach on their own.

use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use aya::{
    maps::{Array, MapData, ProgramArray},
    programs::ProgramFd,
};
use ebpf_common::net::beside;
use parking_lot::Mutex;

/// What `ebpf-net` hands packets on by.
pub struct EntryMaps {
    pub(super) next: ProgramArray<MapData>,
    pub(super) beside: Array<MapData, u32>,
    pub(super) ports: Array<MapData, u64>,
}

/// Shared by the captures.
#[derive(Clone, Default)]
pub struct Entry(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    maps: Option<EntryMaps>,
    /// Of the programs of `dnsflow`, which are the first to see a packet.
    after: Option<ProgramArray<MapData>>,
    http: Option<[ProgramFd; 2]>,
    wanted: u32,
}

/// Programs that entered. They leave when this is dropped.
pub(super) struct Entered {
    entry: Entry,
    what: u32,
}

// === impl Entry ===

impl Entry {
    /// Packets are handed on from now on.
    pub fn open(&self, maps: EntryMaps) {
        *self.0.lock() = State {
            maps: Some(maps),
            ..State::default()
        };
    }

    /// Nothing is handed on any more; whoever entered has left.
    pub fn close(&self) {
        *self.0.lock() = State::default();
    }

    /// Lets the programs of `dnsflow`, egress and ingress, see packets of the ports. Programs of `httpflow` see them behind
    /// theirs, by `after`.
    ///
    /// # Errors
    /// If the way is not open, or the kernel refuses.
    pub(super) fn enter_dns(
        &self,
        words: &[(u32, u64)],
        programs: [&ProgramFd; 2],
        mut after: ProgramArray<MapData>,
    ) -> anyhow::Result<Entered> {
        let mut state = self.0.lock();
        if let Some(http) = &state.http {
            fill(&mut after, 0, http.each_ref())?;
        }
        let maps = state.maps()?;
        for index in 0..maps.ports.len() {
            let word = words.iter().find(|(at, _)| *at == index).map_or(0, |(_, word)| *word);
            maps.ports
                .set(index, word, 0)
                .context("cannot write the ports of DNS")?;
        }
        let entered = Entered {
            entry: self.clone(),
            what: beside::DNS,
        };
        let filled = fill(&mut maps.next, beside::DNS_SLOT, programs).and_then(|()| state.want(beside::DNS, true));
        if filled.is_ok() {
            state.after = Some(after);
        }
        // Leaving takes the lock.
        drop(state);
        filled.map(|()| entered)
    }

    /// Lets the programs of `httpflow`, egress and ingress, see segments with something to tell.
    ///
    /// # Errors
    /// If the way is not open, or the kernel refuses.
    pub(super) fn enter_http(&self, programs: [&ProgramFd; 2]) -> anyhow::Result<Entered> {
        let entered = Entered {
            entry: self.clone(),
            what: beside::HTTP,
        };
        let mut state = self.0.lock();
        let filled = state.enter_http(programs);
        drop(state);
        filled.map(|()| entered)
    }
}

// === impl State ===

impl State {
    fn maps(&mut self) -> anyhow::Result<&mut EntryMaps> {
        self.maps
            .as_mut()
            .ok_or_else(|| anyhow!("the hooks of UDP hand no packets on"))
    }

    fn enter_http(&mut self, programs: [&ProgramFd; 2]) -> anyhow::Result<()> {
        let [egress, ingress] = programs;
        let kept = [egress.try_clone()?, ingress.try_clone()?];
        fill(&mut self.maps()?.next, beside::HTTP_SLOT, programs)?;
        if let Some(after) = &mut self.after {
            fill(after, 0, programs)?;
        }
        self.http = Some(kept);
        self.want(beside::HTTP, true)
    }

    fn want(&mut self, what: u32, on: bool) -> anyhow::Result<()> {
        let wanted = if on { self.wanted | what } else { self.wanted & !what };
        self.maps()?
            .beside
            .set(0, wanted, 0)
            .context("cannot say which packets are wanted")?;
        self.wanted = wanted;
        Ok(())
    }

    fn leave(&mut self, what: u32) {
        if let Err(error) = self.want(what, false) {
            tracing::debug!(error = format!("{error:#}"), "Packets are handed on no longer");
        }
        let slot = if what == beside::DNS {
            self.after = None;
            beside::DNS_SLOT
        } else {
            self.http = None;
            beside::HTTP_SLOT
        };
        if let Some(after) = &mut self.after {
            empty(after, 0);
        }
        if let Some(maps) = &mut self.maps {
            empty(&mut maps.next, slot);
        }
    }
}

fn fill(array: &mut ProgramArray<MapData>, slot: u32, programs: [&ProgramFd; 2]) -> anyhow::Result<()> {
    let [egress, ingress] = programs;
    for (way, program) in [(beside::EGRESS, egress), (beside::INGRESS, ingress)] {
        array
            .set(slot + way, program, 0)
            .context("the kernel does not hand packets on to the program")?;
    }
    Ok(())
}

fn empty(array: &mut ProgramArray<MapData>, slot: u32) {
    for way in [beside::EGRESS, beside::INGRESS] {
        // It may not have been filled.
        let _ = array.clear_index(&(slot + way));
    }
}

// === impl Entered ===

impl Drop for Entered {
    fn drop(&mut self) {
        self.entry.0.lock().leave(self.what);
    }
}
