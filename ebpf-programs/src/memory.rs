//! Clearing of values on the small stack of a kernel program.

use core::mem::MaybeUninit;

/// Clears a value word by word. Plain code for that becomes a call that clears byte by byte, some 0.7 ns each.
///
/// # Safety
/// `T` consists of integers and arrays of them only, is aligned to four or eight bytes and has no padding.
#[inline(always)]
pub unsafe fn cleared<T>(slot: &mut MaybeUninit<T>) -> &mut T {
    let start = slot.as_mut_ptr();
    if align_of::<T>() >= 8 {
        for number in 0..size_of::<T>() / 8 {
            // SAFETY: within the value, and aligned like it.
            unsafe { start.cast::<u64>().add(number).write_volatile(0) };
        }
    } else {
        for number in 0..size_of::<T>() / 4 {
            // SAFETY: as above.
            unsafe { start.cast::<u32>().add(number).write_volatile(0) };
        }
    }
    // SAFETY: all bytes were written, and zero is a valid value of integers.
    unsafe { slot.assume_init_mut() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_cleared() {
        #[repr(C)]
        struct Four {
            a: [u8; 16],
            b: [u16; 2],
            c: u32,
        }
        let mut slot = MaybeUninit::new(Four {
            a: [1; 16],
            b: [2; 2],
            c: 3,
        });
        // SAFETY: integers only, aligned to four bytes, without padding.
        let four = unsafe { cleared(&mut slot) };
        assert_eq!((four.a, four.b, four.c), ([0; 16], [0; 2], 0));
        let mut slot = MaybeUninit::new([u64::MAX; 5]);
        // SAFETY: integers.
        assert_eq!(*unsafe { cleared(&mut slot) }, [0; 5]);
    }
}
