//! Stats: the figures of the VMM's control group.

use containerd_shim_protos::protobuf::well_known_types::any::Any;

use super::{blocking, Tasks};
use crate::error::Result;
use crate::metrics;

impl Tasks {
    /// The figures, in the type that fits the host's version of control groups.
    ///
    /// # Errors
    /// When there is no such container, it has ended, or its figures cannot be read.
    pub async fn stats(&self, id: &str) -> Result<Any> {
        let container = self.get(id)?;
        container.alive()?;
        let instance = container.instance.clone();
        blocking(move || instance.stats().map(|stats| metrics::encode(&stats))).await
    }
}
