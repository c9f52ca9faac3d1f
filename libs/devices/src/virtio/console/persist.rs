//! Saved state of a console: its size, and the input that the guest has not read.

use ovms_state::{Persist, Section, StateError};
use serde::{Deserialize, Serialize};

use super::device::Size;
use super::Console;
use crate::console::InputQueue;
use crate::sync::lock;

const KIND: &str = "virtio-console";
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct ConsoleV1 {
    columns: u16,
    rows: u16,
    input: Vec<u8>,
}

impl Persist for Console {
    fn save(&self) -> Result<Section, StateError> {
        let Size { columns, rows } = *lock(&self.size);
        Section::encode(KIND, VERSION, &ConsoleV1 { columns, rows, input: self.input.contents() })
    }

    fn restore(&self, section: &Section) -> Result<(), StateError> {
        let state: ConsoleV1 = section.decode(KIND, VERSION)?;
        if state.input.len() > InputQueue::MAX_CONTENTS {
            return Err(StateError::Invalid { kind: KIND, what: format!("{} bytes of input", state.input.len()) });
        }
        *lock(&self.size) = Size { columns: state.columns, rows: state.rows };
        self.input.set_contents(&state.input);
        Ok(())
    }
}
