//! The CMOS clock (Motorola MC146818): the host's time in UTC, and the memory size where firmware looks for it.
//!
//! The clock cannot be set: the host's is the truth, and a guest that corrects itself gains nothing by telling us.
//! It raises no interrupt; kernels take their ticks elsewhere.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use ovms_state::{Persist, Section, StateError};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::bus::BusDevice;
use crate::sync::lock;

const KIND: &str = "rtc";
const VERSION: u32 = 1;

/// Registers of clock and memory together.
const CELLS: usize = 128;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

/// 32.768 kHz base, 1024 Hz periodic rate; no update in progress.
const A_VALUE: u8 = 0x26;
const B_24_HOURS: u8 = 1 << 1;
const B_BINARY: u8 = 1 << 2;
const D_VALID: u8 = 1 << 7;

/// Tells the host's time in seconds since 1970, UTC.
pub type WallClock = Arc<dyn Fn() -> i64 + Send + Sync>;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct StateV1 {
    index: u8,
    status_b: u8,
    cells: Vec<u8>,
    /// The time that the fields show: taken when the guest reads the seconds, so that they belong together.
    shown: i64,
}

/// The clock at I/O ports 0x70 (index) and 0x71 (data).
pub struct Rtc {
    state: Mutex<StateV1>,
    power_on: StateV1,
    clock: WallClock,
}

impl Rtc {
    /// A clock on the host's time. `below_4g` and `above_4g` are the guest's memory in bytes under and over the hole.
    pub fn new(below_4g: u64, above_4g: u64) -> Arc<Self> {
        let clock = || {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).map(|d| d.as_secs()).unwrap_or(0);
            i64::try_from(since).unwrap_or(i64::MAX)
        };
        Self::with_clock(below_4g, above_4g, Arc::new(clock))
    }

    /// As [`Rtc::new`], on another clock.
    pub fn with_clock(below_4g: u64, above_4g: u64, clock: WallClock) -> Arc<Self> {
        let power_on =
            StateV1 { index: 0, status_b: B_24_HOURS, cells: memory_cells(below_4g, above_4g), shown: clock() };
        Arc::new(Self { state: Mutex::new(power_on.clone()), power_on, clock })
    }

    /// Back to the power-on state; the time goes on.
    pub fn reset(&self) {
        *lock(&self.state) = StateV1 { shown: (self.clock)(), ..self.power_on.clone() };
    }

    fn read_cell(&self) -> u8 {
        let mut state = lock(&self.state);
        if state.index == SECONDS {
            state.shown = (self.clock)();
        }
        match state.index {
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY => {
                let value = time_field(state.index, state.shown);
                if state.status_b & B_BINARY != 0 {
                    value
                } else {
                    bcd(value)
                }
            }
            STATUS_A => A_VALUE,
            STATUS_B => state.status_b,
            STATUS_C => 0,
            STATUS_D => D_VALID,
            index => state.cells.get(usize::from(index)).copied().unwrap_or(0xff),
        }
    }

    fn write_cell(&self, value: u8) {
        let mut state = lock(&self.state);
        match state.index {
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY => {}
            STATUS_A | STATUS_C | STATUS_D => {}
            // The hours always count to 23.
            STATUS_B => state.status_b = value | B_24_HOURS,
            index => {
                if let Some(cell) = state.cells.get_mut(usize::from(index)) {
                    *cell = value;
                }
            }
        }
    }
}

/// One field of the time; the weekday counts from Sunday = 1.
fn time_field(index: u8, seconds: i64) -> u8 {
    let at = OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    let year = u32::try_from(at.year()).unwrap_or(1970);
    match index {
        SECONDS => at.second(),
        MINUTES => at.minute(),
        HOURS => at.hour(),
        WEEKDAY => at.weekday().number_from_sunday(),
        DAY => at.day(),
        MONTH => at.month().into(),
        YEAR => (year % 100) as u8,
        _ => ((year / 100) % 100) as u8,
    }
}

fn bcd(value: u8) -> u8 {
    ((value / 10) << 4) | (value % 10)
}

/// CMOS cells that PC firmware reads for the size of memory.
fn memory_cells(below_4g: u64, above_4g: u64) -> Vec<u8> {
    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;
    let extended = (below_4g.saturating_sub(MIB) / KIB).min(0xffff);
    let above_16m = (below_4g.saturating_sub(16 * MIB) / (64 * KIB)).min(0xffff);
    let above_4g = (above_4g / (64 * KIB)).min(0xff_ffff);
    // Cell, value, number of cells it fills, low byte first.
    let fields =
        [(0x15usize, 640, 2usize), (0x17, extended, 2), (0x30, extended, 2), (0x34, above_16m, 2), (0x5b, above_4g, 3)];
    let mut cells = vec![0u8; CELLS];
    for (first, value, count) in fields {
        let bytes = value.to_le_bytes();
        for (cell, byte) in cells.iter_mut().skip(first).take(count).zip(bytes) {
            *cell = byte;
        }
    }
    cells
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for byte in data {
            *byte = if offset == 1 { self.read_cell() } else { 0xff };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for &byte in data {
            match offset {
                // Bit 7 masks NMIs, of which there are none.
                0 => lock(&self.state).index = byte & 0x7f,
                1 => self.write_cell(byte),
                _ => {}
            }
        }
    }
}

impl Persist for Rtc {
    fn save(&self) -> Result<Section, StateError> {
        Section::encode(KIND, VERSION, &*lock(&self.state))
    }

    fn restore(&self, section: &Section) -> Result<(), StateError> {
        let state: StateV1 = section.decode(KIND, VERSION)?;
        if state.cells.len() != CELLS || state.index > 0x7f || state.status_b & B_24_HOURS == 0 {
            return Err(StateError::Invalid {
                kind: KIND,
                what: format!("{} cells, index {:#x}, status {:#x}", state.cells.len(), state.index, state.status_b),
            });
        }
        *lock(&self.state) = state;
        Ok(())
    }
}

impl fmt::Debug for Rtc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Rtc")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::contract;
    use std::sync::atomic::{AtomicI64, Ordering};

    /// 2024-02-29 23:59:58 UTC, a Thursday.
    const LEAP_DAY: i64 = 1_709_251_198;

    fn rtc_at(seconds: i64) -> (Arc<Rtc>, Arc<AtomicI64>) {
        let now = Arc::new(AtomicI64::new(seconds));
        let clock = now.clone();
        (Rtc::with_clock(3 << 30, 5 << 30, Arc::new(move || clock.load(Ordering::Relaxed))), now)
    }

    fn read(rtc: &Rtc, index: u8) -> u8 {
        rtc.write(0, &[index]);
        let mut data = [0xff];
        rtc.read(1, &mut data);
        data[0]
    }

    #[test]
    fn fields_show_the_time_in_bcd() {
        let (rtc, _) = rtc_at(LEAP_DAY);
        let fields: Vec<u8> =
            [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY].map(|i| read(&rtc, i)).into();
        assert_eq!(fields, [0x58, 0x59, 0x23, 5, 0x29, 0x02, 0x24, 0x20]);
    }

    #[test]
    fn fields_show_the_time_in_binary_when_asked() {
        let (rtc, _) = rtc_at(LEAP_DAY);
        rtc.write(0, &[STATUS_B]);
        rtc.write(1, &[B_BINARY]);
        assert_eq!((read(&rtc, SECONDS), read(&rtc, STATUS_B)), (58, B_BINARY | B_24_HOURS));
    }

    #[test]
    fn fields_belong_together_until_the_seconds_are_read_again() {
        let (rtc, now) = rtc_at(LEAP_DAY);
        read(&rtc, SECONDS);
        now.store(LEAP_DAY + 2, Ordering::Relaxed);
        assert_eq!(read(&rtc, DAY), 0x29);
        assert_eq!(read(&rtc, SECONDS), 0);
        assert_eq!((read(&rtc, DAY), read(&rtc, MONTH)), (0x01, 0x03));
    }

    #[test]
    fn writes_do_not_set_the_clock() {
        let (rtc, _) = rtc_at(LEAP_DAY);
        rtc.write(0, &[YEAR]);
        rtc.write(1, &[0x99]);
        assert_eq!(read(&rtc, YEAR), 0x24);
    }

    #[test]
    fn memory_cells_tell_the_size() {
        let (rtc, _) = rtc_at(0);
        let above_16m = u16::from_le_bytes([read(&rtc, 0x34), read(&rtc, 0x35)]);
        assert_eq!(u64::from(above_16m) * (64 << 10) + (16 << 20), 3 << 30);
        let above_4g = u32::from_le_bytes([read(&rtc, 0x5b), read(&rtc, 0x5c), read(&rtc, 0x5d), 0]);
        assert_eq!(u64::from(above_4g) * (64 << 10), 5 << 30);
    }

    #[test]
    fn restore_of_impossible_states_returns_invalid() {
        let (rtc, _) = rtc_at(LEAP_DAY);
        let good = StateV1 { index: 0, status_b: B_24_HOURS, cells: vec![0; CELLS], shown: 0 };
        let restore = |state: &StateV1| rtc.restore(&Section::encode(KIND, VERSION, state).unwrap());
        restore(&good).unwrap();
        for bad in [
            StateV1 { cells: vec![0; CELLS - 1], ..good.clone() },
            StateV1 { index: 0x80, ..good.clone() },
            StateV1 { status_b: 0, ..good.clone() },
        ] {
            assert!(matches!(restore(&bad), Err(StateError::Invalid { .. })), "{bad:?}");
        }
    }

    #[test]
    fn contract_holds() {
        contract::bus_device(|| rtc_at(LEAP_DAY).0, 2);
        contract::reset(|| rtc_at(LEAP_DAY).0, |rtc| rtc.reset(), 2);
        contract::persist(|| rtc_at(LEAP_DAY).0, 2);
    }
}
