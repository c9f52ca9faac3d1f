//! ACPI fixed hardware (ACPI 6.5, section 4.8): PM1 event and control blocks, the PM timer and one general-purpose
//! event block, in one I/O range. Power button in, S5 out; both work with a stock kernel that has no driver of ours.
//!
//! | offset | block | length |
//! | --- | --- | --- |
//! | 0 | PM1a event: status, enable | 4 |
//! | 4 | PM1a control | 2 |
//! | 8 | PM timer, 32 bits, 3.579545 MHz | 4 |
//! | 12 | GPE0: status, enable (8 events) | 2 |
//!
//! The machine is always in ACPI mode (no SMI command port in the FADT), so SCI_EN reads as one.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use ovms_state::{Persist, Section, StateError};
use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::irq::IrqLine;
use crate::machine::{EventSink, MachineEvent};
use crate::sync::lock;

/// First I/O port of the range.
pub const IO_BASE: u16 = 0x600;
/// Ports in the range.
pub const IO_LEN: u16 = 16;
/// PM1a event block: offset and length.
pub const PM1_EVENT: (u16, u8) = (0, 4);
/// PM1a control block: offset and length.
pub const PM1_CONTROL: (u16, u8) = (4, 2);
/// PM timer block: offset and length.
pub const PM_TIMER: (u16, u8) = (8, 4);
/// GPE0 block: offset and length.
pub const GPE0: (u16, u8) = (12, 2);
/// The interrupt of the fixed events, level-triggered and active high (say so in the MADT).
pub const SCI_IRQ: u8 = 9;
/// What `\_S5` must name as SLP_TYPa.
pub const SLEEP_TYPE_S5: u8 = 5;
/// The general-purpose event of the VM generation ID device.
pub const GPE_VMGENID: u8 = 0;

const KIND: &str = "acpi-pm";
const VERSION: u32 = 1;

const POWER_BUTTON: u16 = 1 << 8;
const GLOBAL_RELEASE: u16 = 1 << 5;
const TIMER_CARRY: u16 = 1 << 0;
const REAL_TIME_CLOCK: u16 = 1 << 10;
/// Events that software may enable. The timer's carry and the clock's alarm are accepted and never raised: Linux wants
/// to see the alarm's bit stay, even of a clock without alarm.
const ENABLE_BITS: u16 = POWER_BUTTON | GLOBAL_RELEASE | TIMER_CARRY | REAL_TIME_CLOCK;

const SCI_ENABLED: u16 = 1 << 0;
const SLEEP_ENABLE: u16 = 1 << 13;
const SLEEP_TYPE_SHIFT: u32 = 10;

/// Ticks of the PM timer per second.
const TIMER_HZ: u128 = 3_579_545;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct RegistersV1 {
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u8,
    gpe_enable: u8,
    /// Nanoseconds that the timer had run.
    timer_nanos: u64,
}

struct State {
    registers: RegistersV1,
    /// When `registers.timer_nanos` was true.
    since: u64,
}

/// The nanoseconds of a clock that only goes forward.
pub type MonotonicClock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// The fixed hardware.
pub struct Pm {
    state: Mutex<State>,
    sci: Arc<dyn IrqLine>,
    events: EventSink,
    clock: MonotonicClock,
}

impl Pm {
    /// Fixed hardware whose SCI is `sci`; power-off is reported to `events`.
    pub fn new(sci: Arc<dyn IrqLine>, events: EventSink) -> Arc<Self> {
        let start = Instant::now();
        Self::with_clock(sci, events, Arc::new(move || u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)))
    }

    /// As [`Pm::new`], with the timer on another clock.
    pub fn with_clock(sci: Arc<dyn IrqLine>, events: EventSink, clock: MonotonicClock) -> Arc<Self> {
        let state = State { registers: RegistersV1::default(), since: clock() };
        Arc::new(Self { state: Mutex::new(state), sci, events, clock })
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        self.with_registers(|r| r.status |= POWER_BUTTON);
    }

    /// Raises general-purpose event `event` (0 to 7); the ACPI tables say what it means.
    pub fn raise_gpe(&self, event: u8) {
        let bit = 1u8.checked_shl(u32::from(event)).unwrap_or(0);
        self.with_registers(|r| r.gpe_status |= bit);
    }

    /// Sets the timer `nanos` nanoseconds ahead: the machine was away for so long.
    pub fn advance(&self, nanos: u64) {
        let mut state = lock(&self.state);
        state.registers.timer_nanos = state.registers.timer_nanos.wrapping_add(nanos);
    }

    /// Back to the power-on state.
    pub fn reset(&self) {
        let mut state = lock(&self.state);
        state.registers = RegistersV1::default();
        state.since = (self.clock)();
        self.drive(&state.registers);
    }

    /// Changes the registers, then drives the SCI while still under the lock, so that two threads cannot swap an
    /// assert and a deassert.
    fn with_registers<T>(&self, change: impl FnOnce(&mut RegistersV1) -> T) -> T {
        let mut state = lock(&self.state);
        let result = change(&mut state.registers);
        self.drive(&state.registers);
        result
    }

    fn drive(&self, r: &RegistersV1) {
        if r.status & r.enable != 0 || r.gpe_status & r.gpe_enable != 0 {
            self.sci.assert();
        } else {
            self.sci.deassert();
        }
    }

    fn run_nanos(&self, state: &State) -> u64 {
        let run = (self.clock)().saturating_sub(state.since);
        state.registers.timer_nanos.wrapping_add(run)
    }

    /// The whole range as bytes.
    fn image(&self) -> [u8; IO_LEN as usize] {
        let state = lock(&self.state);
        let r = &state.registers;
        let ticks = u128::from(self.run_nanos(&state)).saturating_mul(TIMER_HZ) / 1_000_000_000;
        let ([s0, s1], [e0, e1]) = (r.status.to_le_bytes(), r.enable.to_le_bytes());
        let [c0, c1] = (r.control | SCI_ENABLED).to_le_bytes();
        let [t0, t1, t2, t3] = (ticks as u32).to_le_bytes();
        [s0, s1, e0, e1, c0, c1, 0, 0, t0, t1, t2, t3, r.gpe_status, r.gpe_enable, 0, 0]
    }

    /// Stores one byte; returns whether it put the machine to sleep.
    fn write_byte(&self, offset: u64, value: u8) -> bool {
        let low = u16::from(value);
        let high = low << 8;
        self.with_registers(|r| match offset {
            // Status bits are cleared by writing ones.
            0 => r.status &= !low,
            1 => r.status &= !high,
            2 => r.enable = (r.enable & 0xff00) | (low & ENABLE_BITS),
            3 => r.enable = (r.enable & 0x00ff) | (high & ENABLE_BITS),
            4 => r.control = (r.control & 0xff00) | (low & !SCI_ENABLED),
            // SLP_EN reads as zero.
            5 => r.control = (r.control & 0x00ff) | (high & !SLEEP_ENABLE),
            12 => r.gpe_status &= !value,
            13 => r.gpe_enable = value,
            _ => {}
        });
        let sleep_type = (high >> SLEEP_TYPE_SHIFT) & 7;
        offset == 5 && high & SLEEP_ENABLE != 0 && sleep_type == u16::from(SLEEP_TYPE_S5)
    }
}

impl BusDevice for Pm {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let image = self.image();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        for (to, from) in data.iter_mut().zip(image.get(start..).unwrap_or_default()) {
            *to = *from;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut sleeps = false;
        for (at, &byte) in (offset..u64::from(IO_LEN)).zip(data) {
            sleeps |= self.write_byte(at, byte);
        }
        if sleeps {
            self.events.report(MachineEvent::PowerOff);
        }
    }
}

impl Persist for Pm {
    fn save(&self) -> Result<Section, StateError> {
        let state = lock(&self.state);
        let registers = RegistersV1 { timer_nanos: self.run_nanos(&state), ..state.registers.clone() };
        Section::encode(KIND, VERSION, &registers)
    }

    fn restore(&self, section: &Section) -> Result<(), StateError> {
        let registers: RegistersV1 = section.decode(KIND, VERSION)?;
        let reserved = (registers.enable & !ENABLE_BITS) | (registers.control & (SCI_ENABLED | SLEEP_ENABLE));
        if reserved != 0 || registers.status & !ENABLE_BITS != 0 {
            return Err(StateError::Invalid { kind: KIND, what: "reserved bits in a PM1 register".into() });
        }
        *lock(&self.state) = State { registers, since: (self.clock)() };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::{contract, CountingIrq, EventLog};
    use std::sync::atomic::{AtomicU64, Ordering};

    struct Setup {
        pm: Arc<Pm>,
        sci: Arc<CountingIrq>,
        log: Arc<EventLog>,
        now: Arc<AtomicU64>,
    }

    fn setup() -> Setup {
        let (sci, log, now) = (Arc::<CountingIrq>::default(), Arc::<EventLog>::default(), Arc::<AtomicU64>::default());
        let clock = now.clone();
        let pm = Pm::with_clock(sci.clone(), log.clone(), Arc::new(move || clock.load(Ordering::Relaxed)));
        Setup { pm, sci, log, now }
    }

    fn read16(pm: &Pm, offset: u64) -> u16 {
        let mut data = [0xff; 2];
        pm.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    #[test]
    fn power_button_raises_sci_until_status_is_cleared() {
        let s = setup();
        s.pm.press_power_button();
        assert!(!s.sci.level(), "not enabled yet");
        s.pm.write(2, &POWER_BUTTON.to_le_bytes());
        assert!(s.sci.level());
        assert_eq!(read16(&s.pm, 0), POWER_BUTTON);
        s.pm.write(0, &POWER_BUTTON.to_le_bytes());
        assert!(!s.sci.level());
        assert_eq!(read16(&s.pm, 0), 0);
    }

    #[test]
    fn sleep_enable_with_s5_powers_off_and_others_do_not() {
        let s = setup();
        for sleep_type in 0..8u16 {
            let control = SCI_ENABLED | SLEEP_ENABLE | (sleep_type << SLEEP_TYPE_SHIFT);
            s.pm.write(4, &control.to_le_bytes());
            let expected: &[MachineEvent] = if sleep_type == 5 { &[MachineEvent::PowerOff] } else { &[] };
            assert_eq!(s.log.take(), expected, "type {sleep_type}");
            assert_eq!(read16(&s.pm, 4) & SLEEP_ENABLE, 0);
        }
    }

    #[test]
    fn control_always_says_acpi_mode() {
        let s = setup();
        s.pm.write(4, &[0, 0]);
        assert_eq!(read16(&s.pm, 4), SCI_ENABLED);
    }

    #[test]
    fn timer_runs_at_its_rate_and_on_after_restore() {
        let s = setup();
        s.now.store(2_000_000_000, Ordering::Relaxed);
        let mut data = [0; 4];
        s.pm.read(8, &mut data);
        assert_eq!(u32::from_le_bytes(data), 2 * TIMER_HZ as u32);
        let other = setup();
        other.now.store(77, Ordering::Relaxed);
        other.pm.restore(&s.pm.save().unwrap()).unwrap();
        other.pm.read(8, &mut data);
        assert_eq!(u32::from_le_bytes(data), 2 * TIMER_HZ as u32);
        other.pm.advance(3_000_000_000);
        other.pm.read(8, &mut data);
        assert_eq!(u32::from_le_bytes(data), 5 * TIMER_HZ as u32);
    }

    #[test]
    fn gpe_raises_sci_while_enabled() {
        let s = setup();
        s.pm.write(13, &[1 << GPE_VMGENID]);
        s.pm.raise_gpe(GPE_VMGENID);
        assert!(s.sci.level());
        s.pm.write(12, &[1 << GPE_VMGENID]);
        assert!(!s.sci.level());
        s.pm.raise_gpe(200);
        assert!(!s.sci.level());
    }

    #[test]
    fn contract_holds() {
        contract::bus_device(|| setup().pm, u64::from(IO_LEN));
        contract::reset(|| setup().pm, |pm| pm.reset(), u64::from(IO_LEN));
        contract::persist(|| setup().pm, u64::from(IO_LEN));
    }
}
