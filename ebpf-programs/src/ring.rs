//! When the reader of a ring is woken.

/// `BPF_RB_NO_WAKEUP` and `BPF_RB_FORCE_WAKEUP`, `include/uapi/linux/bpf.h`.
const NO_WAKEUP: u64 = 1;
const FORCE_WAKEUP: u64 = 2;
/// What is not zero of how far a fill is beyond the mark, except in the first 8 KiB of each 64 KiB.
const ELSEWHERE: u64 = 1 << 63 | 0xe000;

/// 1 if the reader is to be woken by an event after which `available` bytes wait in the ring, 0 if not.
///
/// It is woken as the fill passes `mark`. Beyond it has been, and it does not sleep while there is something; each call in vain
/// takes longer than all the rest of an event. As several CPUs may together leap over a stretch, there are more of them.
/// Without a branch: in loops old kernels would walk on twice.
#[inline(always)]
fn wakes(available: u64, mark: u64) -> u64 {
    ((available.wrapping_sub(mark) & ELSEWHERE) >> 13).wrapping_sub(1) >> 63
}

/// Flag with which such an event is submitted.
#[inline(always)]
pub fn submit_flag(available: u64, mark: u64) -> u64 {
    NO_WAKEUP + wakes(available, mark) * (FORCE_WAKEUP - NO_WAKEUP)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARK: u64 = 1 << 20;

    #[test]
    fn the_reader_is_woken_at_the_mark() {
        for (available, expected) in [
            (0, 0),
            (MARK - 1, 0),
            (MARK, 1),
            (MARK + 8191, 1),
            (MARK + 8192, 0),
            (MARK + 65_535, 0),
            (MARK + 65_536, 1),
            (u64::MAX, 0),
        ] {
            assert_eq!(wakes(available, MARK), expected, "{available}");
        }
        assert_eq!((submit_flag(0, MARK), submit_flag(MARK, MARK)), (1, 2));
        // No event is so long that the fill could leap over all of it, and few events wake it in vain.
        for event in [24, 104, 4_144, 8_192] {
            let fills = (event..3 << 20).step_by(event as usize);
            let beyond = fills.clone().filter(|fill| *fill >= MARK).count() as u64;
            let woken: u64 = fills.map(|fill| wakes(fill, MARK)).sum();
            assert!(woken >= 30 && woken <= beyond / 7, "{event}: {woken} of {beyond}");
        }
    }
}
