//! Checkpoint: not in this version.

use super::Tasks;
use crate::error::{Error, Kind, Result};

impl Tasks {
    /// Refuses.
    ///
    /// # Errors
    /// [`Kind::NotFound`], else [`Kind::Unimplemented`].
    pub fn checkpoint(&self, id: &str) -> Result<()> {
        self.get(id)?;
        Err(Error::new(Kind::Unimplemented, "this version of ovms takes no RAM snapshots of running machines"))
    }
}
