//! The guest's time: kvm-clock and the processors' time stamp counters, so that both stand where they would stand if
//! the machine had never been away.
//!
//! ```text
//!   saved:     clock (ns since the guest's boot), real time (ns since 1970), TSC of each processor
//!   restored:  away = real time now - real time then
//!              clock + away ──KVM_SET_CLOCK──> kvm-clock     TSC + away × frequency ──MSR 0x10──> each processor
//! ```
//!
//! The ACPI timer goes ahead as well, so that no counter disagrees with another. So a guest's wall clock is right at once,
//! whichever of them it counts by; its monotonic clock goes on over the time away as over a suspend. It is told of the
//! pause (KVM_KVMCLOCK_CTRL), so that no watchdog barks. A host whose real time is before the snapshot's goes on where the
//! snapshot was.

use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::{kvm_clock_data, KVM_CLOCK_REALTIME};
use ovms_state::{Section, StateError};
use serde::{Deserialize, Serialize};

use crate::kvm::{failed, KvmError, Vm};

/// Kind of the clock's section.
pub const KIND: &str = "clock";
const VERSION: u32 = 1;

/// The time of a machine that stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clock {
    /// kvm-clock in nanoseconds.
    clock: u64,
    /// Nanoseconds since 1970 at that moment, UTC.
    real: u64,
}

impl Clock {
    /// Reads the time of `vm`.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn read(vm: &Vm) -> Result<Self, KvmError> {
        let data = vm.fd().get_clock().map_err(failed("KVM_GET_CLOCK"))?;
        // Kernels before 5.16, and hosts that do not count by the TSC, do not say it at the same moment.
        let real = if data.flags & KVM_CLOCK_REALTIME != 0 { data.realtime } else { real_time() };
        Ok(Self { clock: data.clock, real })
    }

    /// The section that a snapshot keeps.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn save(&self) -> Result<Section, StateError> {
        Section::encode(KIND, VERSION, self)
    }

    /// Reads it back. Every value is a time.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn load(section: &Section) -> Result<Self, StateError> {
        section.decode(KIND, VERSION)
    }

    /// When it was read, in nanoseconds since 1970.
    pub fn real(&self) -> u64 {
        self.real
    }

    /// Nanoseconds that have passed since the clock was read, by the host's real time.
    pub fn away(&self) -> u64 {
        real_time().saturating_sub(self.real)
    }

    /// Sets the clock of `vm` to what it would show now, `away` nanoseconds later.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn set(&self, vm: &Vm, away: u64) -> Result<(), KvmError> {
        // KVM keeps the difference to the host's clock in a signed number.
        let clock = self.clock.saturating_add(away).min(i64::MAX as u64 / 2);
        let data = kvm_clock_data { clock, ..Default::default() };
        vm.fd().set_clock(&data).map_err(failed("KVM_SET_CLOCK"))
    }
}

/// Ticks of a counter of `khz` in `nanos` nanoseconds.
pub fn ticks(nanos: u64, khz: u32) -> u64 {
    let ticks = u128::from(nanos).saturating_mul(u128::from(khz)) / 1_000_000;
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

fn real_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_nanoseconds_times_frequency() {
        assert_eq!(ticks(1_000_000_000, 2_445_406), 2_445_406_000);
        assert_eq!(ticks(500, 1_000_000), 500);
        assert_eq!(ticks(u64::MAX, u32::MAX), u64::MAX);
    }

    #[test]
    fn away_of_a_clock_from_the_future_is_zero() {
        let clock = Clock { clock: 7, real: u64::MAX };
        assert_eq!(clock.away(), 0);
        let clock = Clock { clock: 7, real: real_time() - 5_000_000_000 };
        assert!((5_000_000_000..60_000_000_000).contains(&clock.away()));
    }

    #[test]
    fn clock_is_the_same_after_its_section() {
        let clock = Clock { clock: 1, real: 2 };
        assert_eq!(Clock::load(&clock.save().unwrap()).unwrap(), clock);
    }
}
