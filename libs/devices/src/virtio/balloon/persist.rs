//! Saved state of a balloon: what it was asked for, what it has, and the statistics buffer that it keeps.

use std::sync::atomic::Ordering;

use ovms_state::{Persist, Section, StateError};
use serde::{Deserialize, Serialize};

use super::Balloon;
use crate::sync::lock;

const KIND: &str = "virtio-balloon";
const VERSION: u32 = 1;

/// The largest queue there may be: no descriptor has a higher number.
const MAX_HEAD: u16 = 127;

#[derive(Serialize, Deserialize)]
struct BalloonV1 {
    target: u32,
    actual: u32,
    held: Option<u16>,
}

impl Persist for Balloon {
    fn save(&self) -> Result<Section, StateError> {
        let state = BalloonV1 {
            target: self.target.load(Ordering::Acquire),
            actual: self.actual.load(Ordering::Acquire),
            held: *lock(&self.shared.held),
        };
        Section::encode(KIND, VERSION, &state)
    }

    fn restore(&self, section: &Section) -> Result<(), StateError> {
        let state: BalloonV1 = section.decode(KIND, VERSION)?;
        if let Some(head) = state.held.filter(|head| *head > MAX_HEAD) {
            return Err(StateError::Invalid { kind: KIND, what: format!("a buffer at descriptor {head}") });
        }
        self.target.store(state.target, Ordering::Release);
        self.actual.store(state.actual, Ordering::Release);
        *lock(&self.shared.held) = state.held;
        Ok(())
    }
}
