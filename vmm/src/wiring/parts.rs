//! What of the devices a snapshot keeps, in the order in which it is restored.

use std::collections::BTreeMap;
use std::sync::Arc;

use ovms_devices::legacy::{Ioapic, Rtc, VmGenId, I8042};
use ovms_devices::pci::{PciRoot, PvPanic};
use ovms_devices::virtio::pci::VirtioPci;
use ovms_state::{Persist, Section, StateError};
use thiserror::Error;

use super::legacy::Legacy;

/// Why saved state does not fit this machine.
#[derive(Debug, Error)]
pub enum PartError {
    /// A part says what is wrong.
    #[error("the state of part {kind} cannot be restored")]
    Part {
        /// The section's kind.
        kind: String,
        /// What the part says.
        #[source]
        source: StateError,
    },
    /// A section is missing.
    #[error("the snapshot holds no state of part {0}: it was taken of another kind of machine")]
    Missing(String),
    /// Two sections of one kind.
    #[error("the snapshot holds the state of part {0} twice")]
    Twice(String),
    /// A section that nothing takes.
    #[error("the snapshot holds the state of part {0}, which this machine does not have")]
    Unknown(String),
}

/// Sections by kind, each to be taken once.
pub struct Sections<'a>(BTreeMap<&'a str, &'a Section>);

impl<'a> Sections<'a> {
    /// Sorts `sections`.
    ///
    /// # Errors
    /// [`PartError::Twice`].
    pub fn new(sections: &'a [Section]) -> Result<Self, PartError> {
        let mut sorted = BTreeMap::new();
        for section in sections {
            if sorted.insert(section.kind.as_str(), section).is_some() {
                return Err(PartError::Twice(section.kind.clone()));
            }
        }
        Ok(Self(sorted))
    }

    /// Takes the section of `kind`.
    ///
    /// # Errors
    /// [`PartError::Missing`].
    pub fn take(&mut self, kind: &str) -> Result<&'a Section, PartError> {
        self.0.remove(kind).ok_or_else(|| PartError::Missing(kind.to_owned()))
    }

    /// Restores `part` from the section of `kind`.
    ///
    /// # Errors
    /// [`PartError::Missing`], [`PartError::Part`].
    pub fn restore(&mut self, kind: &str, part: &dyn Persist) -> Result<(), PartError> {
        let section = self.take(kind)?;
        part.restore(section).map_err(|source| PartError::Part { kind: kind.to_owned(), source })
    }

    /// Nothing may be left over.
    ///
    /// # Errors
    /// [`PartError::Unknown`].
    pub fn finish(self) -> Result<(), PartError> {
        match self.0.into_keys().next() {
            Some(kind) => Err(PartError::Unknown(kind.to_owned())),
            None => Ok(()),
        }
    }
}

/// A device that can be saved.
pub(super) type Part = Arc<dyn Persist + Send + Sync>;

/// Parts with the kinds of their sections.
pub(super) struct Parts(Vec<(String, Part)>);

impl Parts {
    /// All parts. Functions come before the bus that decodes their BARs; the interrupt controller comes last, so that it
    /// ends with the wires' levels as they were saved, whatever a device drives while it is restored.
    pub(super) fn new(
        functions: &[Arc<VirtioPci>],
        (root, panic): (Arc<PciRoot>, Arc<PvPanic>),
        legacy: &Legacy,
        generation_id: &Arc<VmGenId>,
        ioapic: &Arc<Ioapic>,
    ) -> Self {
        let mut parts: Vec<(String, Part)> =
            functions.iter().map(|function| (function.name().to_owned(), Arc::clone(function) as Part)).collect();
        let (keyboard, rtc): (&Arc<I8042>, &Arc<Rtc>) = (&legacy.keyboard, &legacy.rtc);
        let fixed: [(&str, Part); 8] = [
            ("pvpanic", panic),
            ("pci-root", root),
            ("serial", Arc::clone(&legacy.serial) as _),
            ("acpi-pm", Arc::clone(&legacy.pm) as _),
            ("i8042", Arc::clone(keyboard) as _),
            ("rtc", Arc::clone(rtc) as _),
            ("vmgenid", Arc::clone(generation_id) as _),
            ("ioapic", Arc::clone(ioapic) as _),
        ];
        parts.extend(fixed.map(|(kind, part)| (kind.to_owned(), part)));
        Self(parts)
    }

    pub(super) fn kinds(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(kind, _)| kind.as_str())
    }

    pub(super) fn save(&self) -> Result<Vec<Section>, StateError> {
        self.0.iter().map(|(_, part)| part.save()).collect()
    }

    pub(super) fn restore(&self, sections: &mut Sections<'_>) -> Result<(), PartError> {
        self.0.iter().try_for_each(|(kind, part)| sections.restore(kind, part.as_ref()))
    }
}
