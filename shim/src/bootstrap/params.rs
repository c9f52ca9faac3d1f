//! Standard input of `start`: nothing, an `Any` with the runtime's options, or `BootstrapParams`.

use std::io::{self, IsTerminal, Read};
use std::path::PathBuf;

use containerd_shim_protos::bootstrap_api::BootstrapParams;
use containerd_shim_protos::protobuf::Message;

use crate::cli::Args;
use crate::error::{Error, Kind, Result};

/// The most bytes that are read from standard input.
const MAX_INPUT: u64 = 4 << 20;

/// What `start` needs beyond the command line.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Params {
    /// containerd's ttrpc socket, where events go.
    pub(super) ttrpc_address: String,
    /// Directory for the server's socket, if containerd names one.
    pub(super) socket_dir: Option<PathBuf>,
    /// containerd wants debug output.
    pub(super) debug: bool,
}

/// Reads standard input to its end.
pub(super) fn read_stdin() -> Result<Vec<u8>> {
    let stdin = io::stdin();
    let mut input = Vec::new();
    if !stdin.is_terminal() {
        stdin.lock().take(MAX_INPUT).read_to_end(&mut input).map_err(|e| Error::caused("cannot read stdin", e))?;
    }
    Ok(input)
}

/// Decides between the two forms. An `Any` decodes as `BootstrapParams` too (its type URL becomes the id, its value
/// the namespace), so only a message that names this very container is one.
pub(super) fn parse(input: &[u8], args: &Args, ttrpc_env: Option<String>) -> Result<Params> {
    let bootstrap = BootstrapParams::parse_from_bytes(input)
        .ok()
        .filter(|params| params.instance_id == args.id && params.namespace == args.namespace);
    let params = match bootstrap {
        Some(params) => Params {
            debug: args.debug || params.log_level.value() < 0,
            socket_dir: params.socket_dir.filter(|dir| !dir.is_empty()).map(PathBuf::from),
            ttrpc_address: Some(params.containerd_ttrpc_address)
                .filter(|address| !address.is_empty())
                .or(ttrpc_env)
                .unwrap_or_default(),
        },
        None => Params { debug: args.debug, socket_dir: None, ttrpc_address: ttrpc_env.unwrap_or_default() },
    };
    if params.ttrpc_address.is_empty() {
        return Err(Error::new(
            Kind::Invalid,
            "neither TTRPC_ADDRESS nor the bootstrap parameters say where containerd takes events",
        ));
    }
    Ok(params)
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::protobuf::well_known_types::any::Any;

    fn args() -> Args {
        crate::cli::parse("-id vm1 -namespace default -address a start".split(' ').map(Into::into)).unwrap()
    }

    #[test]
    fn bootstrap_params_win_over_the_environment() {
        let sent = BootstrapParams {
            instance_id: "vm1".into(),
            namespace: "default".into(),
            containerd_ttrpc_address: "/run/a.ttrpc".into(),
            socket_dir: Some("/run/s".into()),
            ..Default::default()
        };
        let params = parse(&sent.write_to_bytes().unwrap(), &args(), Some("/run/b.ttrpc".into())).unwrap();
        assert_eq!(params.ttrpc_address, "/run/a.ttrpc");
        assert_eq!(params.socket_dir, Some("/run/s".into()));
    }

    #[test]
    fn options_as_any_and_empty_input_take_the_environment() {
        let any = Any { type_url: "containerd.runc.v1.Options".into(), value: b"\x08\x01".to_vec(), ..Any::default() };
        for input in [any.write_to_bytes().unwrap(), Vec::new(), b"\xff\xff garbage".to_vec()] {
            let params = parse(&input, &args(), Some("/run/b.ttrpc".into())).unwrap();
            assert_eq!(params.ttrpc_address, "/run/b.ttrpc");
            assert_eq!(params.socket_dir, None);
        }
    }

    #[test]
    fn parse_without_an_event_address_returns_invalid() {
        assert_eq!(parse(&[], &args(), None).unwrap_err().kind(), Kind::Invalid);
    }
}
