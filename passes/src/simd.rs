//! Loops at the full width of the machine's vectors.

use pulp::NullaryFnOnce;

/// Runs `f` compiled for the widest vectors that this machine has. What `f` calls must be inlined into it to profit.
///
/// Sums keep the order in which they are written, whatever the width: results do not depend on the machine.
#[inline]
pub fn vectorized<T>(f: impl FnOnce() -> T) -> T {
    pulp::Arch::new().dispatch(f)
}

/// The same for loops too long to be inlined as closures: their `call` is to be inlined always.
#[inline]
pub fn vectorized_always<T>(f: impl NullaryFnOnce<Output = T>) -> T {
    pulp::Arch::new().dispatch(f)
}
