//! A keyboard controller (Intel 8042) with nothing plugged in: enough for a kernel to find it sane, and to reset the
//! machine through it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use ovms_state::{Persist, Section, StateError};
use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::machine::{EventSink, MachineEvent, ResetSource};
use crate::sync::lock;

const KIND: &str = "i8042";
const VERSION: u32 = 1;

/// The data port 0x60 and the command port 0x64 as offsets from 0x60.
const DATA: u64 = 0;
const COMMAND: u64 = 4;

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SELF_TEST_PASSED: u8 = 1 << 2;
const STATUS_LAST_WAS_COMMAND: u8 = 1 << 3;
const STATUS_NOT_LOCKED: u8 = 1 << 4;

const READ_CONFIG: u8 = 0x20;
const WRITE_CONFIG: u8 = 0x60;
const DISABLE_AUX: u8 = 0xa7;
const ENABLE_AUX: u8 = 0xa8;
const TEST_AUX: u8 = 0xa9;
const SELF_TEST: u8 = 0xaa;
const TEST_KEYBOARD: u8 = 0xab;
const DISABLE_KEYBOARD: u8 = 0xad;
const ENABLE_KEYBOARD: u8 = 0xae;
const READ_OUTPUT_PORT: u8 = 0xd0;
const WRITE_OUTPUT_PORT: u8 = 0xd1;
const WRITE_AUX: u8 = 0xd4;
const RESET: u8 = 0xfe;

const SELF_TEST_PASSED: u8 = 0x55;
const PORT_TEST_PASSED: u8 = 0x00;
/// An interface without a device: clock line stuck low.
const PORT_TEST_FAILED: u8 = 0x01;

const CONFIG_SYSTEM: u8 = 1 << 2;
const CONFIG_KEYBOARD_OFF: u8 = 1 << 4;
const CONFIG_AUX_OFF: u8 = 1 << 5;

/// Output port: bit 0 low resets the machine, bit 1 opens A20.
const OUTPUT_NOT_RESET: u8 = 1 << 0;
const OUTPUT_A20: u8 = 1 << 1;

/// Bytes of answers that wait at most.
const ANSWERS: usize = 16;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct StateV1 {
    config: u8,
    /// The command that takes the next byte at the data port; 0 when the keyboard does.
    pending: u8,
    last_was_command: bool,
    answers: VecDeque<u8>,
}

impl StateV1 {
    fn power_on() -> Self {
        Self {
            config: CONFIG_SYSTEM | CONFIG_KEYBOARD_OFF | CONFIG_AUX_OFF,
            pending: 0,
            last_was_command: false,
            answers: VecDeque::new(),
        }
    }

    fn answer(&mut self, byte: u8) {
        if self.answers.len() < ANSWERS {
            self.answers.push_back(byte);
        }
    }

    fn status(&self) -> u8 {
        let full = if self.answers.is_empty() { 0 } else { STATUS_OUTPUT_FULL };
        let command = if self.last_was_command { STATUS_LAST_WAS_COMMAND } else { 0 };
        STATUS_SELF_TEST_PASSED | STATUS_NOT_LOCKED | full | command
    }

    /// Returns whether the machine is to be reset.
    fn command(&mut self, command: u8) -> bool {
        self.last_was_command = true;
        self.pending = 0;
        match command {
            READ_CONFIG => self.answer(self.config),
            SELF_TEST => {
                *self = Self { last_was_command: true, ..Self::power_on() };
                self.answer(SELF_TEST_PASSED);
            }
            TEST_KEYBOARD => self.answer(PORT_TEST_PASSED),
            TEST_AUX => self.answer(PORT_TEST_FAILED),
            READ_OUTPUT_PORT => self.answer(OUTPUT_NOT_RESET | OUTPUT_A20),
            DISABLE_KEYBOARD => self.config |= CONFIG_KEYBOARD_OFF,
            ENABLE_KEYBOARD => self.config &= !CONFIG_KEYBOARD_OFF,
            DISABLE_AUX => self.config |= CONFIG_AUX_OFF,
            ENABLE_AUX => self.config &= !CONFIG_AUX_OFF,
            WRITE_CONFIG | WRITE_OUTPUT_PORT | WRITE_AUX => self.pending = command,
            RESET => return true,
            _ => {}
        }
        false
    }

    /// Returns whether the machine is to be reset.
    fn data(&mut self, byte: u8) -> bool {
        self.last_was_command = false;
        match std::mem::take(&mut self.pending) {
            WRITE_CONFIG => self.config = byte,
            WRITE_OUTPUT_PORT => return byte & OUTPUT_NOT_RESET == 0,
            // No mouse and no keyboard: what is sent to them is not answered.
            _ => {}
        }
        false
    }
}

/// The controller at I/O ports 0x60 and 0x64. It takes the range 0x60..0x65 or the two ports by themselves, see
/// [`I8042::data_port`] and [`I8042::command_port`].
pub struct I8042 {
    state: Mutex<StateV1>,
    events: EventSink,
}

impl I8042 {
    /// A controller that reports resets to `events`.
    pub fn new(events: EventSink) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(StateV1::power_on()), events })
    }

    /// The data port alone, for I/O port 0x60.
    pub fn data_port(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Port { controller: Arc::clone(self), offset: DATA })
    }

    /// The command and status port alone, for I/O port 0x64.
    pub fn command_port(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Port { controller: Arc::clone(self), offset: COMMAND })
    }

    /// Back to the power-on state.
    pub fn reset(&self) {
        *lock(&self.state) = StateV1::power_on();
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = lock(&self.state);
        for byte in data {
            *byte = match offset {
                DATA => state.answers.pop_front().unwrap_or(0),
                COMMAND => state.status(),
                _ => 0xff,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut reset = false;
        {
            let mut state = lock(&self.state);
            for &byte in data {
                reset |= match offset {
                    DATA => state.data(byte),
                    COMMAND => state.command(byte),
                    _ => false,
                };
            }
        }
        if reset {
            self.events.report(MachineEvent::Reset(ResetSource::KeyboardController));
        }
    }
}

/// One of the controller's ports as a device of its own.
struct Port {
    controller: Arc<I8042>,
    offset: u64,
}

impl BusDevice for Port {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == 0 {
            self.controller.read(self.offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == 0 {
            self.controller.write(self.offset, data);
        }
    }
}

impl Persist for I8042 {
    fn save(&self) -> Result<Section, StateError> {
        Section::encode(KIND, VERSION, &*lock(&self.state))
    }

    fn restore(&self, section: &Section) -> Result<(), StateError> {
        let state: StateV1 = section.decode(KIND, VERSION)?;
        if state.answers.len() > ANSWERS {
            return Err(StateError::Invalid { kind: KIND, what: format!("{} answers waiting", state.answers.len()) });
        }
        *lock(&self.state) = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::{contract, EventLog};

    fn controller() -> (Arc<I8042>, Arc<EventLog>) {
        let log = Arc::<EventLog>::default();
        (I8042::new(log.clone()), log)
    }

    fn read(device: &dyn BusDevice, offset: u64) -> u8 {
        let mut data = [0xff];
        device.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn pulse_command_resets_the_machine() {
        let (controller, log) = controller();
        controller.command_port().write(0, &[RESET]);
        assert_eq!(log.take(), [MachineEvent::Reset(ResetSource::KeyboardController)]);
    }

    #[test]
    fn output_port_with_low_reset_line_resets_the_machine() {
        let (controller, log) = controller();
        controller.write(COMMAND, &[WRITE_OUTPUT_PORT]);
        controller.write(DATA, &[OUTPUT_A20 | OUTPUT_NOT_RESET]);
        assert!(log.take().is_empty());
        controller.write(COMMAND, &[WRITE_OUTPUT_PORT]);
        controller.write(DATA, &[OUTPUT_A20]);
        assert_eq!(log.take().len(), 1);
    }

    #[test]
    fn self_test_passes_and_the_answer_is_read_once() {
        let (controller, _) = controller();
        controller.write(COMMAND, &[SELF_TEST]);
        assert_ne!(read(controller.as_ref(), COMMAND) & STATUS_OUTPUT_FULL, 0);
        assert_eq!(read(controller.data_port().as_ref(), 0), SELF_TEST_PASSED);
        assert_eq!(read(controller.as_ref(), COMMAND) & STATUS_OUTPUT_FULL, 0);
    }

    #[test]
    fn configuration_byte_is_read_back() {
        let (controller, _) = controller();
        controller.write(COMMAND, &[WRITE_CONFIG]);
        controller.write(DATA, &[0x47]);
        controller.write(COMMAND, &[READ_CONFIG]);
        assert_eq!(read(controller.as_ref(), DATA), 0x47);
    }

    #[test]
    fn contract_holds() {
        contract::bus_device(|| controller().0, 5);
        contract::reset(|| controller().0, |controller| controller.reset(), 5);
        contract::persist(|| controller().0, 5);
    }
}
