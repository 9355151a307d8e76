//! Counters that the kernel side keeps for each CPU.

use aya::maps::{MapData, MapError, PerCpuArray};

/// The first `N` counters of a map, each over all CPUs.
///
/// # Errors
/// If the map cannot be read.
pub(super) fn sums<const N: usize>(map: &PerCpuArray<MapData, u64>) -> Result<[u64; N], MapError> {
    let mut all = [0; N];
    for (index, sum) in (0..).zip(&mut all) {
        let values = map.get(&index, 0)?;
        *sum = values.iter().fold(0, |sum: u64, value| sum.wrapping_add(*value));
    }
    Ok(all)
}
