//! What a PC has at fixed addresses.

use std::sync::Arc;

use ovms_devices::bus::BusBuilder;
use ovms_devices::console::{ByteSink, InputQueue};
use ovms_devices::legacy::{
    pm, DebugPort, Ioapic, Pm, PvPanicPort, ResetPort, Rtc, Serial, SystemControl, I8042, IOAPIC_BASE, IOAPIC_LEN,
    PVPANIC_PORT,
};
use ovms_devices::machine::EventSink;

use super::WiringError;
use crate::layout;
use crate::memory::Ram;

/// The ones that are needed by name afterwards.
pub(super) struct Legacy {
    pub pm: Arc<Pm>,
    pub serial: Arc<Serial>,
    pub keyboard: Arc<I8042>,
    pub rtc: Arc<Rtc>,
}

impl Legacy {
    pub(super) fn insert(
        ports: &mut BusBuilder,
        mmio: &mut BusBuilder,
        ram: &Ram,
        ioapic: &Arc<Ioapic>,
        events: &EventSink,
        console: &Arc<dyn ByteSink>,
        input: &Arc<InputQueue>,
    ) -> Result<Self, WiringError> {
        let pin = |number: u32| {
            let number = number as usize;
            ioapic.pin(number).ok_or(WiringError::Pin(number))
        };
        let serial = Serial::new(pin(layout::IRQ_COM1)?, Arc::clone(console), Arc::clone(input));
        let pm = Pm::new(pin(u32::from(pm::SCI_IRQ))?, Arc::clone(events));
        let keyboard = I8042::new(Arc::clone(events));
        let above = ram.high_end().map_or(0, |end| end.saturating_sub(layout::HIGH_RAM_START));
        let rtc = Rtc::new(ram.low_end(), above);
        let debug = DebugPort::new(Arc::new(|code, _| tracing::debug!(code, "POST code")));
        mmio.insert(IOAPIC_BASE, IOAPIC_LEN, Arc::clone(ioapic) as _)?;
        ports.insert(layout::PORT_COM1, 8, Arc::clone(&serial) as _)?;
        ports.insert(layout::PORT_I8042, 1, keyboard.data_port())?;
        ports.insert(layout::PORT_I8042_COMMAND, 1, keyboard.command_port())?;
        ports.insert(layout::PORT_RTC, 2, Arc::clone(&rtc) as _)?;
        ports.insert(DebugPort::PORT, 1, Arc::new(debug))?;
        ports.insert(SystemControl::PORT, 1, Arc::new(SystemControl::new(Arc::clone(events))))?;
        ports.insert(ResetPort::PORT, 1, Arc::new(ResetPort::new(Arc::clone(events))))?;
        ports.insert(u64::from(pm::IO_BASE), u64::from(pm::IO_LEN), Arc::clone(&pm) as _)?;
        ports.insert(PVPANIC_PORT, 1, Arc::new(PvPanicPort::new(Arc::clone(events))))?;
        Ok(Self { pm, serial, keyboard, rtc })
    }
}
