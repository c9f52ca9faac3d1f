//! Images to and from registries: pull into a sink, push what the registry lacks.
//!
//! ```text
//!  pull: manifest (capped; of an index that for linux/amd64) ─> config and layers that the sink lacks, verified as they
//!        pass ─> manifest
//!  push: HEAD each blob ─ there? done ─ mounted from the repository it came from? done ─ else one PUT, streamed; manifest last
//! ```
//! No credentials are sent: an anonymous token is fetched where a registry hands one out, and a registry that wants more
//! gets a clear error. Registries on this host are spoken to by HTTP, all others by HTTPS unless the caller says
//! otherwise. Everything blocks; the asynchronous client runs on the calling thread.
//!
//! A crate of its own, so that TLS and HTTP are linked into `ovm-transfer` alone and not into each machine's shim.
#![forbid(unsafe_code)]

mod error;
mod pull;
mod push;
mod stream;

use std::time::Duration;

use oci_client::client::{Client, ClientConfig, ClientProtocol};
use oci_client::secrets::RegistryAuth;
use oci_client::RegistryOperation;
use tokio::runtime::Runtime;

pub use error::RegistryError;
pub use oci_client::Reference;
pub use pull::Pulled;
pub use push::{Holder, Pushed};

use error::Context;

/// How long a registry may take to take a connection, and to send the next bytes of an answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// What registries see as our name.
const USER_AGENT: &str = concat!("ovm/", env!("CARGO_PKG_VERSION"));

/// A client of one registry.
pub struct Registry {
    runtime: Runtime,
    client: Client,
    /// For manifests, which are read with a cap.
    http: reqwest::Client,
    reference: Reference,
    scheme: &'static str,
}

/// Reads a reference: `host/repository:tag` or `host/repository@sha256:…`; short forms are those of docker.
///
/// # Errors
/// [`RegistryError::Reference`].
pub fn parse(text: &str) -> Result<Reference, RegistryError> {
    text.parse().map_err(|source| RegistryError::Reference { text: text.to_owned(), source })
}

/// Whether a name has a registry's host in it, so that pushing it means something.
#[must_use]
pub fn names_registry(text: &str) -> bool {
    let host = text.split_once('/').map(|(host, _)| host).unwrap_or_default();
    host == "localhost" || host.contains(['.', ':'])
}

impl Registry {
    /// A client of the registry that `reference` names. `plain_http`: no TLS, whatever the host.
    ///
    /// # Errors
    /// [`RegistryError::Setup`], [`RegistryError::Client`].
    pub fn open(reference: Reference, plain_http: bool) -> Result<Self, RegistryError> {
        // The second call in a process finds the first one's provider, which is the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let host = reference.resolve_registry().to_owned();
        let plain = plain_http || is_local(&host);
        let protocol = if plain { ClientProtocol::Http } else { ClientProtocol::Https };
        let config = ClientConfig {
            protocol,
            use_monolithic_push: true,
            connect_timeout: Some(PATIENCE),
            read_timeout: Some(PATIENCE),
            user_agent: USER_AGENT,
            ..ClientConfig::default()
        };
        let client = Client::try_from(config).context(|| format!("no client for {host} can be made"))?;
        let http = reqwest::Client::builder().connect_timeout(PATIENCE).read_timeout(PATIENCE).user_agent(USER_AGENT);
        let http = http.build().map_err(|source| RegistryError::Http { url: host, source })?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(RegistryError::Setup)?;
        Ok(Self { runtime, client, http, reference, scheme: if plain { "http" } else { "https" } })
    }

    /// Fetches an anonymous token where the registry wants one; later calls send it.
    fn authorize(&self, operation: RegistryOperation) -> Result<Option<String>, RegistryError> {
        let auth = self.client.auth(&self.reference, &RegistryAuth::Anonymous, operation);
        self.runtime.block_on(auth).context(|| format!("registry {} cannot be used", self.host()))
    }

    fn host(&self) -> &str {
        self.reference.resolve_registry()
    }
}

/// Whether a registry's host is this one.
fn is_local(registry: &str) -> bool {
    let host = match registry.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => registry,
    };
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_registries_on_this_host_are_local() {
        for host in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.9.0.1", "[::1]:5000"] {
            assert!(is_local(host), "{host}");
        }
        for host in
            ["docker.io", "localhost.example.org", "10.0.0.1:5000", "[2001:db8::1]:5000", "127.0.0.1.example.org"]
        {
            assert!(!is_local(host), "{host}");
        }
    }

    #[test]
    fn names_registry_wants_a_host() {
        assert!(names_registry("localhost/x") && names_registry("ghcr.io/a/b:1") && names_registry("h:5000/x"));
        assert!(!names_registry("debian:13") && !names_registry("demo/debian:13"));
    }

    #[test]
    fn parse_strange_reference_returns_it() {
        let error = parse("UPPER CASE").err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains("UPPER CASE"), "{error}");
    }
}
