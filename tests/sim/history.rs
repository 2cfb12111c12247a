//! What clients were promised, and whether what they see agrees with it.
//!
//! Each key has one writer and any number of readers, so its history is a count: write number n is *promised* once
//! it was acknowledged or read by anybody. A read may then return any write from the last one promised before it
//! was asked up to the last one that was sent; so may the disk of whoever survives. For one writer a key, that is
//! all of linearizability.

use std::collections::BTreeMap;

/// One key.
#[derive(Default)]
struct Key {
    /// Every value that was sent, oldest first.
    sent: Vec<Vec<u8>>,
    /// How many of them somebody was promised.
    promised: usize,
}

/// The history of all keys.
#[derive(Default)]
pub(super) struct History {
    keys: BTreeMap<String, Key>,
    /// Replies checked.
    pub(super) replies: u64,
    /// Bytes of values sent, to know how full the guest's disk is.
    pub(super) sent_bytes: u64,
}

impl History {
    /// A write is about to be sent.
    pub(super) fn write_sent(&mut self, name: &str, value: Vec<u8>) {
        self.sent_bytes += value.len() as u64 + 1024;
        self.keys.entry(name.to_owned()).or_default().sent.push(value);
    }

    /// The last write of `name` was acknowledged.
    pub(super) fn write_acknowledged(&mut self, name: &str) {
        self.replies += 1;
        let key = self.keys.entry(name.to_owned()).or_default();
        key.promised = key.sent.len();
    }

    /// How many writes a read that is asked now must at least reflect.
    pub(super) fn promised(&self, name: &str) -> usize {
        self.keys.get(name).map_or(0, |key| key.promised)
    }

    /// Checks a read of `name` that must reflect `promised` writes at least, and makes it a promise.
    pub(super) fn read(&mut self, name: &str, promised: usize, value: Option<&[u8]>) -> Result<(), String> {
        self.replies += 1;
        let key = self.keys.entry(name.to_owned()).or_default();
        let number = match value {
            None => Some(0),
            Some(value) => key.sent.iter().rposition(|sent| sent == value).map(|at| at + 1),
        };
        match number {
            Some(number) if number >= promised => {
                key.promised = key.promised.max(number);
                Ok(())
            }
            Some(number) => Err(format!("{name} is write {number}; write {promised} was promised")),
            None => Err(format!("{name} is {} bytes nobody wrote", value.map_or(0, <[u8]>::len))),
        }
    }

    /// Checks everything against the survivor's disk.
    pub(super) fn check_disk(&mut self, disk: &BTreeMap<String, Vec<u8>>) -> Result<(), String> {
        let names: Vec<_> = self.keys.keys().cloned().collect();
        if let Some(stranger) = disk.keys().find(|name| !self.keys.contains_key(*name)) {
            return Err(format!("the disk holds {stranger}, which nobody wrote"));
        }
        for name in names {
            let promised = self.promised(&name);
            self.read(&name, promised, disk.get(&name).map(Vec::as_slice)).map_err(|why| format!("on disk, {why}"))?;
        }
        Ok(())
    }
}
