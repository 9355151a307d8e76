//! Where a kernel program's stack is.
//!
//! From 6.13 on the kernel gives a program of the type of probes a stack that it has once per processor, in the belief that
//! such a program is never interrupted by itself there. Probes of user space are: they run with preemption, and where the
//! kernel is built with it (all are, from 7.0 on) another thread's run writes over the one that waits: lost and mixed up data,
//! and a helper that is given a wrong address. A program with a tail call has no such stack.

/// `bpf_tail_call`
const TAIL_CALL: usize = 12;

/// Keeps a program on the stack of its thread; to be called once in each program at functions of user space.
///
/// The call that does it is never made: the verifier knows that the condition is false, and takes it out.
#[inline(always)]
pub fn stay_on_own() {
    let mut never = 0u64;
    let never = &raw mut never;
    // SAFETY: a local number. The compiler must not know what the verifier does.
    if unsafe {
        never.write_volatile(0);
        never.read_volatile()
    } != 0
    {
        // SAFETY: the number of a helper is its address, as for all of them.
        let call: unsafe extern "C" fn() -> i64 = unsafe { core::mem::transmute(TAIL_CALL) };
        // SAFETY: not reached.
        let _ = unsafe { call() };
    }
}
