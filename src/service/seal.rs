//! Secrets that must be read again: sealed by a key that lies beside the database, not in it.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};

const KEY_BYTES: usize = 32;

/// Seals and opens. Cheap to clone.
#[derive(Clone)]
pub struct Seal(Arc<LessSafeKey>);

impl std::fmt::Debug for Seal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seal")
    }
}

/// The sealed bytes were changed, belong to another thing, or were sealed by another key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a secret does not open: it was sealed by another key, or is damaged")]
pub struct Broken;

impl Seal {
    /// With the key of `file`, which is made when missing and only its owner may read.
    pub fn open(file: &Path) -> io::Result<Self> {
        let bytes = match fs::read(file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => make(file)?,
            read => read?,
        };
        let key: [u8; KEY_BYTES] = bytes.try_into().map_err(|bytes: Vec<u8>| {
            let text = format!("holds {} bytes; a key has {KEY_BYTES}", bytes.len());
            io::Error::new(io::ErrorKind::InvalidData, text)
        })?;
        Ok(Self::with(&key))
    }

    /// With this very key.
    ///
    /// # Panics
    /// Never: the key has the length it must have.
    pub fn with(key: &[u8; KEY_BYTES]) -> Self {
        let key = UnboundKey::new(&CHACHA20_POLY1305, key)
            .expect("the key is as long as it must be. This is a bug.");
        Self(Arc::new(LessSafeKey::new(key)))
    }

    /// Seals `secret` for the thing that is called `owner`; it opens for no other.
    ///
    /// # Panics
    /// When the secret is longer than 256 GiB.
    pub fn seal(&self, owner: &[u8], secret: &[u8]) -> Vec<u8> {
        let nonce: [u8; NONCE_LEN] = random();
        let mut sealed = secret.to_vec();
        self.0
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(owner), &mut sealed)
            .expect("a secret is short. This is a bug.");
        [&nonce[..], &sealed].concat()
    }

    pub fn unseal(&self, owner: &[u8], sealed: &[u8]) -> Result<Vec<u8>, Broken> {
        let (nonce, sealed) = sealed.split_first_chunk::<NONCE_LEN>().ok_or(Broken)?;
        let mut opened = sealed.to_vec();
        let opened =
            self.0.open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::from(owner), &mut opened);
        opened.map(|bytes| bytes.to_vec()).map_err(|_| Broken)
    }
}

/// Bytes nobody can guess.
///
/// # Panics
/// When the system has no randomness to give.
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).expect("the system gives random bytes. This is a bug.");
    bytes
}

/// Of two processes that start at once, the first one's key counts.
fn make(file: &Path) -> io::Result<Vec<u8>> {
    let draft = file.with_extension(format!("{}.part", std::process::id()));
    let mut out = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
    out.write_all(&random::<KEY_BYTES>())?;
    out.sync_all()?;
    let placed = fs::hard_link(&draft, file);
    fs::remove_file(&draft)?;
    match placed {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        Err(_) | Ok(()) => fs::read(file),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_opens_with_its_key_for_its_owner_only() {
        let seal = Seal::with(&[7; KEY_BYTES]);
        let sealed = seal.seal(b"a", b"secret");
        assert_eq!(seal.unseal(b"a", &sealed).unwrap(), b"secret");
        assert_ne!(sealed, seal.seal(b"a", b"secret"), "no two sealings are alike");
        assert!(!sealed.windows(6).any(|w| w == b"secret"));
        assert_eq!(seal.unseal(b"b", &sealed), Err(Broken));
        assert_eq!(Seal::with(&[8; KEY_BYTES]).unseal(b"a", &sealed), Err(Broken));
        for cut in 0..sealed.len() {
            assert_eq!(seal.unseal(b"a", &sealed[..cut]), Err(Broken));
        }
    }

    #[test]
    fn the_key_is_made_once_and_only_its_owner_may_read_it() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("secret.key");
        let sealed = Seal::open(&file).unwrap().seal(b"a", b"secret");
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Seal::open(&file).unwrap().unseal(b"a", &sealed).unwrap(), b"secret");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        fs::write(&file, b"short").unwrap();
        assert!(Seal::open(&file).unwrap_err().to_string().contains("5 bytes"));
    }
}
