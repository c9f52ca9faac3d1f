//! Update: new limits for a live machine.

use super::{blocking, Tasks};
use crate::error::Result;
use crate::oci::resources;

impl Tasks {
    /// Applies `resources`, the JSON of the OCI spec's `LinuxResources`, to the VMM's control group.
    ///
    /// # Errors
    /// When there is no such container, it has ended, the JSON is none, or the control group refuses.
    pub async fn update(&self, id: &str, resources: &[u8]) -> Result<()> {
        let container = self.get(id)?;
        container.alive()?;
        let limits = resources::parse_update(resources)?;
        let instance = container.instance.clone();
        blocking(move || instance.update(&limits)).await
    }
}
