//! The VM generation ID: 16 random bytes in guest memory that change whenever the machine was cloned or went back in
//! time, so that the guest reseeds what must be unique (Microsoft, "Virtual Machine Generation ID"; ACPI `_HID`
//! `VMGENCTR`, `_CID` `VM_Gen_Counter`).
//!
//! Pure state: the machine monitor writes [`VmGenId::guid`] to [`VmGenId::address`] and raises
//! [`super::pm::GPE_VMGENID`], in that order.

use std::sync::Mutex;

use ovms_state::{Persist, Section, StateError};
use serde::{Deserialize, Serialize};

use crate::sync::lock;

const KIND: &str = "vmgenid";
const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct StateV1 {
    address: u64,
    guid: [u8; 16],
}

/// The identifier and where it lies.
#[derive(Debug)]
pub struct VmGenId(Mutex<StateV1>);

impl VmGenId {
    /// Bytes of the identifier.
    pub const BYTES: u64 = 16;
    /// What its address is a multiple of: the page that the firmware reserves for it.
    pub const ALIGNMENT: u64 = 4096;

    /// An identifier at guest physical `address`, which the tables name and nothing else uses.
    pub fn new(address: u64, guid: [u8; 16]) -> Self {
        Self(Mutex::new(StateV1 { address, guid }))
    }

    /// Where it lies in guest memory.
    pub fn address(&self) -> u64 {
        lock(&self.0).address
    }

    /// The identifier as it lies in memory.
    pub fn guid(&self) -> [u8; 16] {
        lock(&self.0).guid
    }

    /// Takes a new identifier, 16 fresh random bytes.
    pub fn regenerate(&self, guid: [u8; 16]) {
        lock(&self.0).guid = guid;
    }
}

impl Persist for VmGenId {
    fn save(&self) -> Result<Section, StateError> {
        Section::encode(KIND, VERSION, &*lock(&self.0))
    }

    /// The address is this machine's; a section that names another is of another machine.
    fn restore(&self, section: &Section) -> Result<(), StateError> {
        let state: StateV1 = section.decode(KIND, VERSION)?;
        let mut own = lock(&self.0);
        if state.address != own.address {
            let what = format!("address {:#x} instead of {:#x}", state.address, own.address);
            return Err(StateError::Invalid { kind: KIND, what });
        }
        *own = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::contract;
    use std::sync::Arc;

    #[test]
    fn restore_takes_the_identifier_and_refuses_another_address() {
        let id = VmGenId::new(0x1000, [1; 16]);
        let other = VmGenId::new(0x1000, [2; 16]);
        other.restore(&id.save().unwrap()).unwrap();
        assert_eq!(other.guid(), [1; 16]);
        assert!(VmGenId::new(0x2000, [0; 16]).restore(&id.save().unwrap()).is_err());
    }

    #[test]
    fn damaged_sections_are_refused_or_work() {
        let make = || Arc::new(VmGenId::new(0x1000, [1; 16]));
        contract::damaged_sections(&make().save().unwrap(), make, |id, _| id.regenerate([3; 16]));
    }
}
