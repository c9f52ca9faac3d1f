//! The I/O APIC (Intel 82093AA, with the EOI register of version 0x20) in userspace, for a split interrupt chip.
//!
//! ```text
//!   device ──IoapicPin──> pin level ──redirection entry──> MsiMessage ──MsiSink──> local APIC
//!                           ^   remote IRR blocks a level pin until its EOI             │
//!                           └──────────────── Ioapic::eoi(vector) <── KVM_EXIT_IOAPIC_EOI ┘
//! ```
//!
//! The kernel exits on an EOI only for vectors that its routing table knows as level-triggered, so every change of an
//! entry is told to [`IoapicRoutes`].

use std::sync::{Arc, Mutex};

use ovms_state::{Persist, Section, StateError};
use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::irq::{IrqLine, MsiMessage, MsiSink};
use crate::sync::lock;

/// Where PC software expects the first I/O APIC.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Bytes of its window.
pub const IOAPIC_LEN: u64 = 0x1000;
/// Input pins.
pub const IOAPIC_PINS: usize = 24;

const KIND: &str = "ioapic";
const VERSION: u32 = 1;

/// Register select, data window and EOI (82093AA data sheet, section 3.1; EOI: Intel ICH9, 13.5).
const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;
const EOIR: u64 = 0x40;

const INDEX_ID: u8 = 0x00;
const INDEX_VERSION: u8 = 0x01;
const INDEX_ARBITRATION: u8 = 0x02;
const INDEX_TABLE: u8 = 0x10;

/// Version 0x20, highest entry 23.
const VERSION_VALUE: u32 = 0x0017_0020;
const ID_BITS: u32 = 0x0f00_0000;

const ENTRY_VECTOR: u64 = 0xff;
const ENTRY_LOGICAL: u64 = 1 << 11;
const ENTRY_STATUS: u64 = 1 << 12;
const ENTRY_REMOTE_IRR: u64 = 1 << 14;
const ENTRY_LEVEL: u64 = 1 << 15;
const ENTRY_MASKED: u64 = 1 << 16;
/// What software may write: all but the two status bits and the reserved middle.
const ENTRY_WRITABLE: u64 = 0xff00_0000_0001_ffff & !(ENTRY_STATUS | ENTRY_REMOTE_IRR);

/// Is told how the kernel shall route the pins. Called on the vCPU thread that wrote the entry.
pub trait IoapicRoutes: Send + Sync {
    /// Pin `pin` now sends `message`; `None` when it is masked. A masked level pin may still be in service: leave its
    /// last route in the kernel's table, or its EOI never exits.
    fn route(&self, pin: usize, message: Option<MsiMessage>);
}

struct NoRoutes;

impl IoapicRoutes for NoRoutes {
    fn route(&self, _pin: usize, _message: Option<MsiMessage>) {}
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct PinV1 {
    entry: u64,
    /// One bit per wire on the pin.
    wires: u32,
    /// An edge came while the pin was masked.
    latched: bool,
}

impl PinV1 {
    fn has(&self, bits: u64) -> bool {
        self.entry & bits != 0
    }

    fn message(&self) -> MsiMessage {
        let destination = self.entry >> 56;
        let logical = if self.has(ENTRY_LOGICAL) { 1 << 2 } else { 0 };
        // Vector and delivery mode lie at the same bits in both; level messages assert (Intel SDM vol. 3, 12.11).
        let low = (self.entry & 0x7ff) as u32;
        let trigger = if self.has(ENTRY_LEVEL) { (1 << 15) | (1 << 14) } else { 0 };
        MsiMessage { address: 0xfee0_0000 | (destination << 12) | logical, data: low | trigger }
    }

    /// Decides whether the pin sends its message now, and notes that it did.
    fn fire(&mut self) -> Option<MsiMessage> {
        if self.has(ENTRY_MASKED) {
            return None;
        }
        if self.has(ENTRY_LEVEL) {
            if self.wires == 0 || self.has(ENTRY_REMOTE_IRR) {
                return None;
            }
            self.entry |= ENTRY_REMOTE_IRR;
        } else if !std::mem::take(&mut self.latched) {
            return None;
        }
        Some(self.message())
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct StateV1 {
    id: u32,
    select: u8,
    pins: Vec<PinV1>,
}

impl StateV1 {
    fn power_on() -> Self {
        let pin = PinV1 { entry: ENTRY_MASKED, ..PinV1::default() };
        Self { id: 0, select: 0, pins: vec![pin; IOAPIC_PINS] }
    }

    /// The pin that the selected register belongs to, and whether it is the entry's high half.
    fn selected(&self) -> Option<(usize, bool)> {
        let index = usize::from(self.select.checked_sub(INDEX_TABLE)?);
        (index / 2 < IOAPIC_PINS).then_some((index / 2, index % 2 == 1))
    }

    fn read_register(&self) -> u32 {
        match self.select {
            INDEX_ID | INDEX_ARBITRATION => self.id,
            INDEX_VERSION => VERSION_VALUE,
            _ => match self.selected().and_then(|(pin, high)| Some((self.pins.get(pin)?, high))) {
                Some((pin, true)) => (pin.entry >> 32) as u32,
                Some((pin, false)) => pin.entry as u32,
                None => 0,
            },
        }
    }

    /// Returns the pin whose entry changed.
    fn write_register(&mut self, value: u32) -> Option<usize> {
        if self.select == INDEX_ID {
            self.id = value & ID_BITS;
            return None;
        }
        let (index, high) = self.selected()?;
        let pin = self.pins.get_mut(index)?;
        let (keep, new) =
            if high { (0xffff_ffff, u64::from(value) << 32) } else { (0xffff_ffff_0000_0000, u64::from(value)) };
        let writable = ENTRY_WRITABLE & !keep;
        pin.entry = (pin.entry & !writable) | (new & writable);
        if !pin.has(ENTRY_LEVEL) {
            // Remote IRR has no meaning for an edge; Linux switches a pin to edge and back to clear it.
            pin.entry &= !ENTRY_REMOTE_IRR;
        }
        Some(index)
    }
}

/// The I/O APIC.
pub struct Ioapic {
    state: Mutex<StateV1>,
    /// Wires handed out per pin.
    wires: Mutex<[u32; IOAPIC_PINS]>,
    sink: Arc<dyn MsiSink>,
    routes: Arc<dyn IoapicRoutes>,
}

impl Ioapic {
    /// An I/O APIC with every pin masked.
    pub fn new(sink: Arc<dyn MsiSink>, routes: Option<Arc<dyn IoapicRoutes>>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(StateV1::power_on()),
            wires: Mutex::new([0; IOAPIC_PINS]),
            sink,
            routes: routes.unwrap_or_else(|| Arc::new(NoRoutes)),
        })
    }

    /// A new wire to pin `pin`. Wires on one pin are ORed; at most 32 fit. They must be made in the same order in a
    /// machine that is to be restored. `None` if there is no such pin or it is full.
    pub fn pin(self: &Arc<Self>, pin: usize) -> Option<Arc<IoapicPin>> {
        let mut wires = lock(&self.wires);
        let used = wires.get_mut(pin)?;
        let wire = 1u32.checked_shl(*used)?;
        *used = used.saturating_add(1);
        Some(Arc::new(IoapicPin { ioapic: Arc::clone(self), pin, wire }))
    }

    /// The local APICs are done with `vector`: what the machine monitor calls for KVM_EXIT_IOAPIC_EOI.
    pub fn eoi(&self, vector: u8) {
        let fired: Vec<MsiMessage> = {
            let mut state = lock(&self.state);
            state
                .pins
                .iter_mut()
                .filter(|pin| pin.has(ENTRY_LEVEL) && pin.entry & ENTRY_VECTOR == u64::from(vector))
                .filter_map(|pin| {
                    pin.entry &= !ENTRY_REMOTE_IRR;
                    pin.fire()
                })
                .collect()
        };
        for message in fired {
            self.sink.signal(message);
        }
    }

    /// Back to the power-on state; the wires keep their levels.
    pub fn reset(&self) {
        {
            let mut state = lock(&self.state);
            let fresh = StateV1::power_on();
            for (pin, new) in state.pins.iter_mut().zip(fresh.pins) {
                *pin = PinV1 { wires: pin.wires, ..new };
            }
            state.id = fresh.id;
            state.select = fresh.select;
        }
        self.tell_routes();
    }

    fn tell_routes(&self) {
        // A pin in service counts as one that is not masked: its EOI has to come here.
        let routed = |pin: &PinV1| !pin.has(ENTRY_MASKED) || pin.has(ENTRY_REMOTE_IRR);
        let routes: Vec<Option<MsiMessage>> =
            lock(&self.state).pins.iter().map(|pin| routed(pin).then(|| pin.message())).collect();
        for (pin, message) in routes.into_iter().enumerate() {
            self.routes.route(pin, message);
        }
    }

    fn write_window(&self, value: u32) {
        let (index, route, fired) = {
            let mut state = lock(&self.state);
            let Some(index) = state.write_register(value) else { return };
            let Some(pin) = state.pins.get_mut(index) else { return };
            (index, (!pin.has(ENTRY_MASKED)).then(|| pin.message()), pin.fire())
        };
        self.routes.route(index, route);
        if let Some(message) = fired {
            self.sink.signal(message);
        }
    }

    fn drive(&self, index: usize, wire: u32, high: bool) {
        let fired = {
            let mut state = lock(&self.state);
            let Some(pin) = state.pins.get_mut(index) else { return };
            let was_high = pin.wires != 0;
            if high {
                pin.wires |= wire;
            } else {
                pin.wires &= !wire;
            }
            pin.latched |= !was_high && pin.wires != 0 && !pin.has(ENTRY_LEVEL);
            pin.fire()
        };
        if let Some(message) = fired {
            self.sink.signal(message);
        }
    }
}

/// The window takes aligned 32-bit accesses; shorter reads see the low bytes, anything else nothing.
impl BusDevice for Ioapic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            IOREGSEL => u32::from(lock(&self.state).select),
            IOWIN => lock(&self.state).read_register(),
            _ => 0,
        };
        data.fill(0);
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (IOREGSEL, [select, ..]) => lock(&self.state).select = *select,
            (IOWIN, [a, b, c, d]) => self.write_window(u32::from_le_bytes([*a, *b, *c, *d])),
            (EOIR, [vector, ..]) => self.eoi(*vector),
            _ => {}
        }
    }
}

/// A wire to one pin of the I/O APIC.
pub struct IoapicPin {
    ioapic: Arc<Ioapic>,
    pin: usize,
    wire: u32,
}

impl IrqLine for IoapicPin {
    fn assert(&self) {
        self.ioapic.drive(self.pin, self.wire, true);
    }

    fn deassert(&self) {
        self.ioapic.drive(self.pin, self.wire, false);
    }
}

impl Persist for Ioapic {
    fn save(&self) -> Result<Section, StateError> {
        Section::encode(KIND, VERSION, &*lock(&self.state))
    }

    /// Restores entries and wires without sending anything, then tells the routes.
    fn restore(&self, section: &Section) -> Result<(), StateError> {
        let state: StateV1 = section.decode(KIND, VERSION)?;
        let invalid = |what: String| Err(StateError::Invalid { kind: KIND, what });
        if state.pins.len() != IOAPIC_PINS {
            return invalid(format!("{} pins instead of {IOAPIC_PINS}", state.pins.len()));
        }
        if state.id & !ID_BITS != 0 {
            return invalid(format!("id {:#x}", state.id));
        }
        let reserved = !(ENTRY_WRITABLE | ENTRY_REMOTE_IRR);
        let wrong =
            state.pins.iter().position(|pin| pin.has(reserved) || (pin.has(ENTRY_REMOTE_IRR) && !pin.has(ENTRY_LEVEL)));
        if let Some(pin) = wrong {
            return invalid(format!("pin {pin} with reserved bits"));
        }
        let loose = {
            let wires = lock(&self.wires);
            let beyond = |used: u32| u32::MAX.checked_shl(used).unwrap_or(0);
            state.pins.iter().zip(wires.iter()).position(|(pin, used)| pin.wires & beyond(*used) != 0)
        };
        if let Some(pin) = loose {
            return invalid(format!("pin {pin} with a wire that leads nowhere"));
        }
        *lock(&self.state) = state;
        self.tell_routes();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::{contract, MsiLog};

    fn ioapic() -> (Arc<Ioapic>, Arc<MsiLog>) {
        let log = Arc::<MsiLog>::default();
        (Ioapic::new(log.clone(), None), log)
    }

    fn write_entry(ioapic: &Ioapic, pin: u8, entry: u64) {
        for (half, value) in [(1, (entry >> 32) as u32), (0, entry as u32)] {
            ioapic.write(IOREGSEL, &[INDEX_TABLE + pin * 2 + half]);
            ioapic.write(IOWIN, &value.to_le_bytes());
        }
    }

    fn read_register(ioapic: &Ioapic, index: u8) -> u32 {
        ioapic.write(IOREGSEL, &[index]);
        let mut data = [0xff; 4];
        ioapic.read(IOWIN, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn version_register_says_24_pins() {
        assert_eq!(read_register(&ioapic().0, INDEX_VERSION) >> 16, 23);
    }

    #[test]
    fn edge_pin_sends_once_per_edge_to_the_destination() {
        let (ioapic, log) = ioapic();
        let pin = ioapic.pin(4).unwrap();
        write_entry(&ioapic, 4, (3 << 56) | 0x31);
        pin.assert();
        pin.assert();
        assert_eq!(log.take(), [MsiMessage { address: 0xfee0_3000, data: 0x31 }]);
        pin.deassert();
        pin.pulse();
        assert_eq!(log.take().len(), 1);
    }

    #[test]
    fn edge_on_a_masked_pin_is_sent_when_it_is_unmasked() {
        let (ioapic, log) = ioapic();
        write_entry(&ioapic, 4, ENTRY_MASKED | 0x31);
        ioapic.pin(4).unwrap().pulse();
        assert!(log.take().is_empty());
        write_entry(&ioapic, 4, 0x31);
        assert_eq!(log.take().len(), 1);
        write_entry(&ioapic, 4, 0x31);
        assert!(log.take().is_empty());
    }

    #[test]
    fn level_pin_waits_for_eoi_and_fires_again_while_asserted() {
        let (ioapic, log) = ioapic();
        let pin = ioapic.pin(9).unwrap();
        write_entry(&ioapic, 9, ENTRY_LEVEL | 0x55);
        pin.assert();
        assert_eq!(log.take(), [MsiMessage { address: 0xfee0_0000, data: 0xc055 }]);
        assert_ne!(read_register(&ioapic, INDEX_TABLE + 18) & ENTRY_REMOTE_IRR as u32, 0);
        pin.deassert();
        pin.assert();
        assert!(log.take().is_empty());
        ioapic.eoi(0x54);
        assert!(log.take().is_empty());
        ioapic.eoi(0x55);
        assert_eq!(log.take().len(), 1);
        pin.deassert();
        ioapic.eoi(0x55);
        assert!(log.take().is_empty());
        assert_eq!(read_register(&ioapic, INDEX_TABLE + 18) & ENTRY_REMOTE_IRR as u32, 0);
    }

    #[test]
    fn switch_to_edge_and_back_clears_remote_irr() {
        let (ioapic, log) = ioapic();
        let pin = ioapic.pin(9).unwrap();
        write_entry(&ioapic, 9, ENTRY_LEVEL | 0x55);
        pin.assert();
        log.take();
        write_entry(&ioapic, 9, ENTRY_MASKED | 0x55);
        write_entry(&ioapic, 9, ENTRY_LEVEL | 0x55);
        assert_eq!(log.take().len(), 1, "still asserted, and not in service any more");
    }

    #[test]
    fn restore_of_impossible_states_returns_invalid() {
        let (ioapic, _) = ioapic();
        let good = StateV1::power_on();
        let with_entry = |entry| {
            let mut state = good.clone();
            state.pins[3].entry = entry;
            state
        };
        let with_wire = |wire| {
            let mut state = good.clone();
            state.pins[3].wires = wire;
            state
        };
        let _wire = ioapic.pin(3).unwrap();
        let restore = |state: &StateV1| ioapic.restore(&Section::encode(KIND, VERSION, state).unwrap());
        for bad in [
            with_entry(ENTRY_REMOTE_IRR),
            with_entry(ENTRY_STATUS),
            with_entry(1 << 40),
            StateV1 { id: 1, ..good.clone() },
            with_wire(2),
            StateV1 { pins: good.pins[1..].to_vec(), ..good.clone() },
        ] {
            assert!(matches!(restore(&bad), Err(StateError::Invalid { .. })), "{bad:?}");
        }
        restore(&with_entry(ENTRY_REMOTE_IRR | ENTRY_LEVEL)).unwrap();
        restore(&with_wire(1)).unwrap();
    }

    #[derive(Default)]
    struct RouteLog(Mutex<Vec<(usize, Option<MsiMessage>)>>);

    impl IoapicRoutes for RouteLog {
        fn route(&self, pin: usize, message: Option<MsiMessage>) {
            lock(&self.0).push((pin, message));
        }
    }

    #[test]
    fn restore_routes_a_masked_pin_that_is_in_service() {
        let routes = Arc::<RouteLog>::default();
        let ioapic = Ioapic::new(Arc::<MsiLog>::default(), Some(routes.clone()));
        let mut state = StateV1::power_on();
        state.pins[9].entry = ENTRY_MASKED | ENTRY_LEVEL | ENTRY_REMOTE_IRR | 0x55;
        ioapic.restore(&Section::encode(KIND, VERSION, &state).unwrap()).unwrap();
        let routed: Vec<usize> = lock(&routes.0).iter().filter(|(_, m)| m.is_some()).map(|(pin, _)| *pin).collect();
        assert_eq!(routed, [9]);
    }

    #[test]
    fn wires_on_one_pin_are_ored() {
        let (ioapic, log) = ioapic();
        let (a, b) = (ioapic.pin(9).unwrap(), ioapic.pin(9).unwrap());
        write_entry(&ioapic, 9, ENTRY_LEVEL | 0x55);
        a.assert();
        b.assert();
        a.deassert();
        log.take();
        ioapic.eoi(0x55);
        assert_eq!(log.take().len(), 1, "the other wire is still high");
    }

    #[test]
    fn write_of_status_bits_changes_nothing() {
        let (ioapic, _) = ioapic();
        write_entry(&ioapic, 1, ENTRY_LEVEL | ENTRY_REMOTE_IRR | ENTRY_STATUS | 0x40);
        assert_eq!(u64::from(read_register(&ioapic, INDEX_TABLE + 2)), ENTRY_LEVEL | 0x40);
    }

    #[test]
    fn contract_holds() {
        contract::bus_device(|| ioapic().0, 0x60);
        contract::reset(|| ioapic().0, |ioapic| ioapic.reset(), 0x60);
        contract::persist(|| ioapic().0, 0x60);
    }
}
