//! Machines that another process runs: asked over their sockets.

use ovms_proto::machine::{Canceller, Client, RefusalKind, RequestError, ToMachine};

use crate::engine::Engine;
use crate::error::{Error, Kind, Result};
use crate::record;

/// A machine of another process's engine, ready for one request.
#[derive(Debug)]
pub struct Remote {
    client: Client,
}

impl Engine {
    /// Reaches the engine of a machine, in whatever process it lives.
    ///
    /// # Errors
    /// `NotFound` if there is no such machine, `Unavailable` if its engine is gone or it has ended, `InvalidArgument` for a
    /// name that none can have.
    pub fn remote(&self, namespace: &str, id: &str) -> Result<Remote> {
        self.load(namespace, id)?;
        let socket = record::socket(self.runtime(), namespace, id);
        let client = Client::connect(&socket).map_err(|err| {
            let message = format!("machine {namespace}/{id} has ended, or the process that ran it is gone");
            Error::new(Kind::Unavailable, message).because(err)
        })?;
        Ok(Remote { client })
    }
}

impl Remote {
    /// What ends the request from another thread, for instance when the user presses Ctrl-C.
    ///
    /// # Errors
    /// `Internal`.
    pub fn canceller(&self) -> Result<Canceller> {
        self.client.canceller().map_err(error)
    }

    /// Asks and waits for the answer; `progress` gets a sentence now and then. Returns the microseconds for which the guest
    /// stood still.
    ///
    /// # Errors
    /// What the machine's own engine says; `Unavailable` if it goes away meanwhile or the request was cancelled.
    pub fn request(self, request: &ToMachine, progress: &mut dyn FnMut(&str)) -> Result<u64> {
        self.client.request(request, progress).map_err(error)
    }
}

fn error(err: RequestError) -> Error {
    match err {
        RequestError::Refused { kind, message } => Error::new(kind_of(kind), message),
        err => Error::new(Kind::Unavailable, "the machine's engine did not answer").because(err),
    }
}

fn kind_of(kind: RefusalKind) -> Kind {
    match kind {
        RefusalKind::NotFound => Kind::NotFound,
        RefusalKind::Invalid => Kind::InvalidArgument,
        RefusalKind::Precondition => Kind::FailedPrecondition,
        RefusalKind::Internal => Kind::Internal,
    }
}
