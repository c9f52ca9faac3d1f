//! Exec: needs an agent in the guest.

use super::Tasks;
use crate::error::{Error, Kind, Result};

/// Why there is no second process.
pub(super) const NO_AGENT: &str =
    "the image has no agent that could start processes in the virtual machine; use its console (`ctr task attach`)";

impl Tasks {
    /// Refuses; nothing is registered.
    ///
    /// # Errors
    /// [`Kind::NotFound`], else [`Kind::Unimplemented`].
    pub fn exec(&self, id: &str) -> Result<()> {
        self.get(id)?;
        Err(Error::new(Kind::Unimplemented, format!("cannot exec in container {id}: {NO_AGENT}")))
    }
}
