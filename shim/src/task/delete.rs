//! Delete: what an ended container holds is freed and its name with it.

use containerd_shim_protos::events::task::TaskDelete;
use containerd_shim_protos::protobuf::MessageField;
use tracing::error;

use super::Tasks;
use crate::error::{Error, Kind, Result};
use crate::events::{timestamp, Event};
use crate::instance::Exit;

impl Tasks {
    /// Deletes an ended container and gives its pid and how it ended.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Precondition`] while the machine lives.
    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<(u32, Exit)> {
        let container = self.get_init(id, exec_id)?;
        let _turn = container.turn.lock().await;
        let Some(exit) = container.exit() else {
            return Err(Error::new(Kind::Precondition, format!("container {id} is running: kill it first")));
        };
        // Two clients may ask at once: the first one frees, the second finds nothing.
        if self.map().remove(id).is_none() {
            return Err(Error::new(Kind::NotFound, format!("there is no container {id}")));
        }
        if let Err(error) = container.free().await {
            // The container is gone for its user; `delete` from the command line follows and tries the rest again.
            error!(id, error = error.chain(), "cannot free everything that a machine held");
        }
        self.events.publish(Event::Delete(TaskDelete {
            container_id: id.to_owned(),
            id: String::new(),
            pid: container.pid,
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        }));
        Ok((container.pid, exit))
    }
}
