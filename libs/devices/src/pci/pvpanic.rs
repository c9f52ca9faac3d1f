//! pvpanic as a PCI function (1b36:0011), the form that Debian's kernel has a driver for: one register in BAR 0.

use std::sync::{Arc, Mutex};

use ovms_state::{Persist, Section, StateError};
use serde::{Deserialize, Serialize};

use super::config::{BarSpec, ConfigSpace, ConfigV1, Identity};
use super::{BarRange, PciFunction, BAR_COUNT};
use crate::legacy::PvPanicRegister;
use crate::machine::EventSink;
use crate::sync::lock;

const KIND: &str = "pvpanic";
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct PvPanicV1 {
    config: ConfigV1,
}

/// The function.
pub struct PvPanic {
    config: Mutex<ConfigSpace>,
    register: PvPanicRegister,
}

impl PvPanic {
    /// Bytes of BAR 0: a page, so that it shares none.
    pub const BAR_LEN: u64 = 0x1000;

    /// A function with BAR 0 at `address`, below 4 GiB; `None` if it cannot lie there.
    pub fn new(address: u64, events: EventSink) -> Option<Arc<Self>> {
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x1b36,
            device: 0x0011,
            revision: 1,
            // System peripheral, other.
            class: [0x08, 0x80, 0x00],
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        let spec = BarSpec { index: 0, address, size: Self::BAR_LEN, wide: false, prefetchable: false };
        config
            .add_bar(spec)
            .then(|| Arc::new(Self { config: Mutex::new(config), register: PvPanicRegister::new(events) }))
    }
}

impl PciFunction for PvPanic {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        lock(&self.config).read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        lock(&self.config).write(offset, data);
    }

    fn bars(&self) -> [Option<BarRange>; BAR_COUNT] {
        lock(&self.config).bars()
    }

    fn bar_read(&self, _bar: usize, offset: u64, data: &mut [u8]) {
        self.register.read(offset, data);
    }

    fn bar_write(&self, _bar: usize, offset: u64, data: &[u8]) {
        self.register.write(offset, data);
    }

    fn reset(&self) {
        lock(&self.config).reset();
    }
}

impl Persist for PvPanic {
    fn save(&self) -> Result<Section, StateError> {
        Section::encode(KIND, VERSION, &PvPanicV1 { config: lock(&self.config).save() })
    }

    fn restore(&self, section: &Section) -> Result<(), StateError> {
        let state: PvPanicV1 = section.decode(KIND, VERSION)?;
        let mut config = lock(&self.config);
        let bytes = config.check(KIND, &state.config)?;
        config.load(bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::MachineEvent;
    use crate::testkit::{contract, EventLog, FunctionBus};

    fn function() -> (Arc<PvPanic>, Arc<EventLog>) {
        let log = Arc::<EventLog>::default();
        (PvPanic::new(0xe000_0000, log.clone()).unwrap(), log)
    }

    #[test]
    fn write_to_the_register_reports_the_panic() {
        let (function, log) = function();
        function.bar_write(0, 0, &[1]);
        assert_eq!(log.take(), [MachineEvent::GuestPanic]);
    }

    #[test]
    fn new_at_an_odd_address_returns_none() {
        assert!(PvPanic::new(0xe000_0010, Arc::<EventLog>::default()).is_none());
    }

    #[test]
    fn contract_holds() {
        let make = || Arc::new(FunctionBus(function().0));
        contract::bus_device(make, FunctionBus::<PvPanic>::LEN);
        contract::reset(make, |bus| bus.0.reset(), FunctionBus::<PvPanic>::LEN);
        contract::persist(make, FunctionBus::<PvPanic>::LEN);
    }
}
