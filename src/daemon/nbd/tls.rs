//! Encryption of NBD connections, and who may have one: X.509, by the file names that QEMU, nbdkit and libnbd share.
//!
//! ```text
//!   DIR/ca-cert.pem       who signs clients      DIR/server-cert.pem, DIR/server-key.pem   who we are
//! ```
//!
//! The trap: encryption without a client's certificate keeps secrets from listeners and lets everybody write. So a
//! certificate is demanded unless that is switched off by name.
//!
//! Source: qemu `docs/system/tls.rst`; `doc/proto.md`, "TLS support".

use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Which certificates, in qemu-nbd's words: `tls-creds-x509,id=ID,endpoint=server,dir=DIR[,verify-peer=on|off]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Credentials {
    /// What `--tls-creds` calls them.
    pub id: String,
    /// Where they are.
    pub dir: PathBuf,
    /// Clients need one that the CA has signed.
    pub verify_peer: bool,
}

/// What is wrong with an `--object`.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadCredentials {
    /// Another kind of object.
    #[error("only tls-creds-x509,id=ID,endpoint=server,dir=DIR[,verify-peer=on|off] is understood, not {0:?}")]
    Kind(String),
    /// A word that is none of these.
    #[error("{0:?} is not understood; id, endpoint=server, dir and verify-peer=on|off are")]
    Word(String),
    /// It has no name, or no folder.
    #[error("{0} is missing")]
    Missing(&'static str),
}

impl std::str::FromStr for Credentials {
    type Err = BadCredentials;

    fn from_str(text: &str) -> Result<Self, BadCredentials> {
        let mut words = text.split(',');
        let kind = words.next().unwrap_or_default();
        if kind.strip_prefix("qom-type=").unwrap_or(kind) != "tls-creds-x509" {
            return Err(BadCredentials::Kind(kind.to_owned()));
        }
        let (mut id, mut dir, mut verify_peer) = (None, None, true);
        for word in words {
            match word.split_once('=') {
                Some(("id", value)) => id = Some(value.to_owned()),
                Some(("dir", value)) => dir = Some(PathBuf::from(value)),
                Some(("endpoint", "server")) => {}
                Some(("verify-peer", "on" | "yes" | "true")) => verify_peer = true,
                Some(("verify-peer", "off" | "no" | "false")) => verify_peer = false,
                _ => return Err(BadCredentials::Word(word.to_owned())),
            }
        }
        let (id, dir) = (id.ok_or(BadCredentials::Missing("id"))?, dir.ok_or(BadCredentials::Missing("dir"))?);
        Ok(Self { id, dir, verify_peer })
    }
}

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is missing or is no certificate.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: pem::Error,
    },
    /// The authority's file has nothing in it that can sign.
    #[error("{}: no certificate that could sign a client's: {source}", path.display())]
    Authority {
        /// Which.
        path: PathBuf,
        /// Why.
        source: VerifierBuilderError,
    },
    /// Certificate and key do not belong together, or are of a kind that is not supported.
    #[error("the server's certificate and key: {0}")]
    Pair(#[from] rustls::Error),
}

/// Reads certificates.
pub fn load(credentials: &Credentials) -> Result<Arc<ServerConfig>, TlsError> {
    let path = |name: &str| credentials.dir.join(name);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let builder = if credentials.verify_peer {
        let authority = path("ca-cert.pem");
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&authority)? {
            roots.add(certificate)?;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider).build();
        builder.with_client_cert_verifier(verifier.map_err(|source| TlsError::Authority { path: authority, source })?)
    } else {
        builder.with_no_client_auth()
    };
    let key_path = path("server-key.pem");
    let key = PrivateKeyDer::from_pem_file(&key_path).map_err(|source| TlsError::File { path: key_path, source })?;
    Ok(Arc::new(builder.with_single_cert(certificates(&path("server-cert.pem"))?, key)?))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |source| TlsError::File { path: path.to_owned(), source };
    let found = CertificateDer::pem_file_iter(path).map_err(failed)?.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    if found.is_empty() { Err(failed(pem::Error::NoItemsFound)) } else { Ok(found) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemu_nbds_words_and_nothing_else() {
        let parsed: Credentials =
            "tls-creds-x509,id=tls0,endpoint=server,dir=/etc/pki,verify-peer=off".parse().unwrap();
        assert_eq!(parsed, Credentials { id: "tls0".into(), dir: "/etc/pki".into(), verify_peer: false });
        let parsed: Credentials = "tls-creds-x509,id=tls0,dir=pki".parse().unwrap();
        assert!(parsed.verify_peer, "unless it is switched off");
        for (text, complaint) in [
            ("secret,id=x", "only tls-creds-x509"),
            ("tls-creds-x509,dir=x", "id is missing"),
            ("tls-creds-x509,id=x", "dir is missing"),
            ("tls-creds-x509,id=x,dir=y,endpoint=client", "\"endpoint=client\" is not understood"),
        ] {
            let error = text.parse::<Credentials>().unwrap_err().to_string();
            assert!(error.contains(complaint), "{error}");
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let credentials = Credentials { id: "x".into(), dir: dir.path().to_owned(), verify_peer: true };
        let error = load(&credentials).unwrap_err().to_string();
        assert!(error.contains("ca-cert.pem"), "{error}");
        std::fs::write(dir.path().join("ca-cert.pem"), "nothing").unwrap();
        let error = load(&credentials).unwrap_err().to_string();
        assert!(error.contains("ca-cert.pem"), "{error}");
    }
}
