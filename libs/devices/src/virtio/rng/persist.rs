//! Saved state of the entropy device: none of its own, and certainly no randomness.

use ovms_state::{Persist, Section, StateError};

use super::Rng;

const KIND: &str = "virtio-rng";
const VERSION: u32 = 1;

impl Persist for Rng {
    fn save(&self) -> Result<Section, StateError> {
        Section::encode(KIND, VERSION, &())
    }

    fn restore(&self, section: &Section) -> Result<(), StateError> {
        section.decode(KIND, VERSION)
    }
}
