//! A global allocator that counts, for benchmarks that report allocations per record.
//!
//! A benchmark binary installs it: `#[global_allocator] static ALLOC: CountingAllocator = CountingAllocator;` and
//! takes the difference of [`snapshot`] around the measured part.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicU64, Ordering},
};

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static BYTES: AtomicU64 = AtomicU64::new(0);
static FREED: AtomicU64 = AtomicU64::new(0);

/// The system allocator with two counters in front.
#[derive(Clone, Copy, Debug, Default)]
pub struct CountingAllocator;

/// Allocations since the process began; all zero when [`CountingAllocator`] is not installed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AllocSnapshot {
    /// Calls that took memory (a growing reallocation is one).
    pub allocations: u64,
    /// Bytes asked for by them.
    pub bytes: u64,
    /// Bytes given back, shrinking reallocations included.
    pub freed: u64,
}

/// The counters now.
#[must_use]
pub fn snapshot() -> AllocSnapshot {
    AllocSnapshot {
        allocations: ALLOCATIONS.load(Ordering::Relaxed),
        bytes: BYTES.load(Ordering::Relaxed),
        freed: FREED.load(Ordering::Relaxed),
    }
}

impl AllocSnapshot {
    /// What was allocated since `earlier`.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Self {
        Self {
            allocations: self.allocations.wrapping_sub(earlier.allocations),
            bytes: self.bytes.wrapping_sub(earlier.bytes),
            freed: self.freed.wrapping_sub(earlier.freed),
        }
    }

    /// Bytes asked for and not given back. Without the allocator's own overhead.
    #[must_use]
    pub const fn live(self) -> u64 {
        self.bytes.saturating_sub(self.freed)
    }
}

fn count(bytes: usize) {
    ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    BYTES.fetch_add(bytes as u64, Ordering::Relaxed);
}

// SAFETY: every call is handed to `System` unchanged; counting touches only atomics and does not allocate.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller keeps `GlobalAlloc::alloc`'s contract, which is `System`'s.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as in `alloc`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count(new_size.saturating_sub(layout.size()));
        FREED.fetch_add(layout.size().saturating_sub(new_size) as u64, Ordering::Relaxed);
        // SAFETY: `ptr` came from this allocator, hence from `System`, with that layout.
        unsafe { System.realloc(ptr, layout, new_size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        FREED.fetch_add(layout.size() as u64, Ordering::Relaxed);
        // SAFETY: `ptr` came from this allocator, hence from `System`, with that layout.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_calls_and_bytes() {
        let before = snapshot();
        let layout = Layout::new::<[u64; 128]>();
        // SAFETY: the layout is not zero-sized; the block is freed once, with the layout it has by then.
        unsafe {
            let block = CountingAllocator.alloc(layout);
            let block = CountingAllocator.realloc(block, layout, 2048);
            let block = CountingAllocator.realloc(block, Layout::new::<[u64; 256]>(), 512);
            assert_eq!(snapshot().since(before).live(), 512);
            CountingAllocator.dealloc(block, Layout::new::<[u64; 64]>());
        }
        assert_eq!(
            snapshot().since(before),
            AllocSnapshot {
                allocations: 3,
                bytes: 2048,
                freed: 2048
            }
        );
    }
}
