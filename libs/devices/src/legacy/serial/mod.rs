//! A 16550A serial port: the pure register machine in `uart`, its bus, wire and host ends here.
//!
//! ```text
//!   guest OUT 0x3f8 ──> Uart ──byte──> ByteSink
//!   guest IN  0x3f8 <── Uart <──feed── InputQueue <── host
//!                        └─ level ──> IrqLine
//! ```

mod uart;

use std::sync::{Arc, Mutex};

use ovms_state::{Persist, Section, StateError};
use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::console::{ByteSink, InputQueue};
use crate::irq::IrqLine;
use crate::sync::lock;
use uart::{Uart, UartV1, FIFO_BYTES};

/// Kind of the section that a serial port saves.
const KIND: &str = "serial";
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct SerialV1 {
    uart: UartV1,
    input: Vec<u8>,
}

/// A serial port on the I/O bus.
///
/// Bytes of input wait in the [`InputQueue`] until the guest shows that it reads: it enables the receive interrupt,
/// or polls the line status. What is typed while the guest still boots, or while its driver clears the FIFO, is thus
/// not lost, as it would be on a wire.
pub struct Serial {
    uart: Mutex<Uart>,
    irq: Arc<dyn IrqLine>,
    sink: Arc<dyn ByteSink>,
    input: Arc<InputQueue>,
}

impl Serial {
    /// A port in its power-on state.
    pub fn new(irq: Arc<dyn IrqLine>, sink: Arc<dyn ByteSink>, input: Arc<InputQueue>) -> Arc<Self> {
        let serial = Arc::new(Self { uart: Mutex::new(Uart::new()), irq, sink, input });
        let device = Arc::downgrade(&serial);
        serial.input.on_data(move || {
            if let Some(serial) = device.upgrade() {
                serial.with_uart(|_| ());
            }
        });
        serial
    }

    /// Back to the power-on state. What the host typed stays.
    pub fn reset(&self) {
        self.with_uart(|uart| {
            self.input.unread(&uart.take_received());
            *uart = Uart::new();
        });
    }

    /// Does `step`, moves input into the FIFO while the guest wants it, then drives the wire.
    fn with_uart<T>(&self, step: impl FnOnce(&mut Uart) -> T) -> T {
        let mut uart = lock(&self.uart);
        let result = step(&mut uart);
        self.input.unread(&uart.take_unread());
        let room = uart.wants_input();
        if room > 0 {
            uart.receive(&self.input.pop(room));
        }
        // The wire is driven under the lock: two threads must not swap an assert and a deassert.
        if uart.interrupt_level() {
            self.irq.assert();
        } else {
            self.irq.deassert();
        }
        result
    }
}

/// A string instruction arrives as one long access; all its bytes go to, or come from, the one register.
impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for byte in data {
            *byte = self.with_uart(|uart| uart.read(offset));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for &byte in data {
            if let Some(sent) = self.with_uart(|uart| uart.write(offset, byte)) {
                self.sink.push(&[sent]);
            }
        }
    }
}

impl Persist for Serial {
    fn save(&self) -> Result<Section, StateError> {
        let uart = lock(&self.uart);
        Section::encode(KIND, VERSION, &SerialV1 { uart: uart.save(), input: self.input.contents() })
    }

    fn restore(&self, section: &Section) -> Result<(), StateError> {
        let state: SerialV1 = section.decode(KIND, VERSION)?;
        if state.input.len() > InputQueue::MAX_CONTENTS {
            return Err(StateError::Invalid { kind: KIND, what: format!("{} bytes of input", state.input.len()) });
        }
        let restored = Uart::restore(state.uart).ok_or_else(|| StateError::Invalid {
            kind: KIND,
            what: format!("a FIFO of more than {FIFO_BYTES} bytes or reserved register bits"),
        })?;
        let mut uart = lock(&self.uart);
        *uart = restored;
        self.input.set_contents(&state.input);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::{contract, CountingIrq, RecordingSink};

    fn port() -> (Arc<Serial>, Arc<CountingIrq>, Arc<RecordingSink>, Arc<InputQueue>) {
        let (irq, sink, input) = (Arc::<CountingIrq>::default(), Arc::<RecordingSink>::default(), Arc::default());
        (Serial::new(irq.clone(), sink.clone(), Arc::clone(&input)), irq, sink, input)
    }

    fn read(serial: &Serial, offset: u64) -> u8 {
        let mut data = [0xff];
        serial.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn write_of_a_string_sends_every_byte() {
        let (serial, _, sink, _) = port();
        serial.write(0, b"hello");
        assert_eq!(sink.bytes(), b"hello");
    }

    #[test]
    fn input_before_the_guest_listens_survives_fifo_clears() {
        let (serial, irq, _, input) = port();
        input.push(b"ls\n");
        // What Linux does when it opens the port: clear both FIFOs, read every register once, then enable.
        for value in [1, 7, 0] {
            serial.write(2, &[value]);
        }
        for offset in [5, 0, 2, 6] {
            read(&serial, offset);
        }
        assert!(!irq.level());
        serial.write(2, &[1]);
        serial.write(1, &[1]);
        assert!(irq.level());
        let got: Vec<u8> = std::iter::from_fn(|| (read(&serial, 5) & 1 != 0).then(|| read(&serial, 0))).collect();
        assert_eq!(got, b"ls\n");
        assert!(!irq.level());
    }

    #[test]
    fn input_in_the_fifo_survives_its_reset() {
        let (serial, _, _, input) = port();
        serial.write(2, &[1]);
        serial.write(1, &[1]);
        input.push(b"abc");
        assert_eq!(read(&serial, 0), b'a');
        // The port is closed and opened again: interrupts off, FIFO cleared, interrupts on.
        serial.write(1, &[0]);
        serial.write(2, &[7]);
        assert_eq!(read(&serial, 5) & 1, 0);
        serial.write(1, &[1]);
        assert_eq!((read(&serial, 0), read(&serial, 0)), (b'b', b'c'));
    }

    #[test]
    fn input_reaches_a_guest_that_only_polls() {
        let (serial, _, _, input) = port();
        input.push(b"ab");
        let mut got = Vec::new();
        for _ in 0..20 {
            if read(&serial, 5) & 1 != 0 {
                got.push(read(&serial, 0));
            }
        }
        assert_eq!(got, b"ab");
    }

    #[test]
    fn input_longer_than_the_fifo_arrives_whole_and_in_order() {
        let (serial, irq, _, input) = port();
        serial.write(2, &[0x81]);
        serial.write(1, &[1]);
        let typed: Vec<u8> = (0..200).collect();
        assert_eq!(input.push(&typed), 200);
        let mut got = Vec::new();
        while irq.level() {
            got.push(read(&serial, 0));
        }
        assert_eq!(got, typed);
    }

    #[test]
    fn contract_holds() {
        contract::bus_device(|| port().0, 8);
        contract::reset(|| port().0, |serial| serial.reset(), 8);
        contract::persist(|| port().0, 8);
    }

    #[test]
    fn restore_long_fifo_returns_invalid() {
        let (serial, ..) = port();
        let mut uart = Uart::new().save();
        uart.fifo = vec![0; FIFO_BYTES + 1];
        let section = Section::encode(KIND, VERSION, &SerialV1 { uart, input: vec![] }).unwrap();
        assert!(matches!(serial.restore(&section), Err(StateError::Invalid { .. })));
    }
}
