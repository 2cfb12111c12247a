//! The moment at which a guest is booted on images that may have been a replica's.
//!
//! ```text
//!  every record: whole? ──▶ all the same checkpoint, of the same set, each in its place? ──▶ every record: guest
//!        │ no                          │ no
//!        ▼                             ▼
//!   refused, by the image's name; nothing is written
//! ```
//!
//! Whole images are not enough: disks of two checkpoints, or of two guests, are no guest's. The trap is the crash in
//! between two of the last words: then one image is a guest's, the other still the checkpoint. No byte of either has
//! changed, and yet it is refused, because a restored copy of an old image would look the same.

use super::state::{FileState, Place, Standing, State, Why, path};
use crate::disk::{Disk, DiskError, FileDisk};
use std::fmt;
use std::path::PathBuf;

/// Why an image does not become a guest's disk.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It is not whole.
    #[error(
        "{} is not whole: {why}; let a host that has the guest protect it to this one again, or copy a whole disk over \
         it, and remove {}{}", image.display(), state.display(),
        if *.why == Why::TakenOver { "; if no other copy is left, save this one before anything else" } else { "" }
    )]
    NotWhole {
        /// The image.
        image: PathBuf,
        /// Its record.
        state: PathBuf,
        /// Why it is not.
        why: Why,
    },
    /// The guest's other images are not at the same checkpoint, or are not all there.
    #[error(
        "{} is not whole with the guest's other disks: {why}; name all of the guest's images, in their order, or let a \
         host that has the guest protect it to this one again", image.display()
    )]
    Apart {
        /// The image.
        image: PathBuf,
        /// What does not fit.
        why: Apart,
    },
    /// It is a checkpoint, and the guest in memory is past it.
    #[error(
        "{} is {standing}, and the guest that runs here is past it; destroy that one to boot from the checkpoint",
        image.display()
    )]
    Behind {
        /// The image.
        image: PathBuf,
        /// What it is.
        standing: Standing,
    },
    /// The record cannot be read or written.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// Makes the images of a guest its own disks, before the guest's first write; refused when they are not whole, or not
/// together. `runs` says that the guest is there already, and remembers its disks. An image that never held a replica
/// needs no record.
pub fn take_up(images: &[PathBuf], runs: bool) -> Result<(), StateError> {
    let open = |image: &PathBuf| {
        // A record without its image is about one that was removed.
        let disk =
            if image.exists() { Some(Box::new(FileDisk::open_read_only(image)?) as Box<dyn Disk>) } else { None };
        Ok(Taken { state: State::open(Box::new(FileState::of(image)))?, image: disk })
    };
    let mut taken = images.iter().map(open).collect::<Result<Vec<_>, DiskError>>()?;
    take_up_states(&mut taken, runs).map_err(|(at, refused)| {
        let image = images[at].clone();
        match refused {
            Refused::Disk(error) => error.into(),
            Refused::NotWhole(why) => StateError::NotWhole { state: path(&image), image, why },
            Refused::Apart(why) => StateError::Apart { image, why },
            Refused::Behind(standing) => StateError::Behind { image, standing },
        }
    })
}

/// What keeps whole images from being one guest's disks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Apart {
    /// It is a checkpoint as another of them, or one of another number of disks, or of other ones.
    Place {
        /// What it is by its record.
        is: Place,
        /// Where it was named, from 0.
        at: usize,
        /// How many images were named.
        of: usize,
    },
    /// Another one is of another checkpoint, or none.
    Checkpoint {
        /// What it is.
        is: Standing,
        /// What the first one is.
        first: Standing,
    },
}

impl fmt::Display for Apart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Place { is, at, of } => {
                write!(f, "it is {is} of a checkpoint's, and was named as disk{at} of {of}")
            }
            Self::Checkpoint { is, first } => write!(f, "it is {is}, and disk0 is {first}"),
        }
    }
}

/// [`StateError`] without its names.
#[derive(Debug)]
pub(super) enum Refused {
    NotWhole(Why),
    Apart(Apart),
    Behind(Standing),
    Disk(DiskError),
}

/// An image that is to be taken up.
pub(super) struct Taken {
    pub(super) state: State,
    /// `None` while there is no image yet, whatever the record says.
    pub(super) image: Option<Box<dyn Disk>>,
}

impl Taken {
    fn standing(&self) -> Standing {
        if self.image.is_none() { Standing::NoRecord } else { self.state.standing() }
    }
}

/// All of them, or the first that stands in the way, by its index.
pub(super) fn take_up_states(taken: &mut [Taken], runs: bool) -> Result<(), (usize, Refused)> {
    judge(taken, runs)?;
    for (at, Taken { state, image }) in taken.iter_mut().enumerate() {
        // A guest builds on what it reads: that must be what is there.
        image.as_mut().map_or(Ok(()), |image| image.reread()).map_err(|error| (at, Refused::Disk(error)))?;
        if state.standing() != Standing::NoRecord {
            state.belong(None);
            state.record(Standing::Guest).map_err(|error| (at, Refused::Disk(error)))?;
        }
    }
    Ok(())
}

fn judge(taken: &[Taken], runs: bool) -> Result<(), (usize, Refused)> {
    let refuse = |at, refused| Err((at, refused));
    for (at, one) in taken.iter().enumerate() {
        match one.standing() {
            Standing::Resync(why) => return refuse(at, Refused::NotWhole(why)),
            standing @ Standing::Checkpoint { .. } if runs => return refuse(at, Refused::Behind(standing)),
            _ => {}
        }
    }
    let first = taken.first().map_or(Standing::NoRecord, Taken::standing);
    let set = taken.first().and_then(|one| one.state.place).map(|place| place.set);
    for (at, one) in taken.iter().enumerate() {
        let is = one.standing();
        if !matches!(is, Standing::Checkpoint { .. }) && !matches!(first, Standing::Checkpoint { .. }) {
            continue;
        }
        // A record without a place is of a guest with one disk.
        let of = taken.len();
        let place = one.state.place.unwrap_or(Place { set: 0, index: 0, count: 1 });
        if is != first {
            return refuse(at, Refused::Apart(Apart::Checkpoint { is, first }));
        }
        if usize::from(place.index) != at || usize::from(place.count) != of || (of > 1 && Some(place.set) != set) {
            return refuse(at, Refused::Apart(Apart::Place { is: place, at, of }));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::state::found;
    use super::*;
    use std::fs;
    use std::path::Path;

    #[test]
    fn the_record_lies_beside_the_image_and_outlives_its_process() {
        let dir = tempfile::tempdir().unwrap();
        let (image, link) = (dir.path().join("image"), dir.path().join("link"));
        fs::write(&image, b"disk").unwrap();
        std::os::unix::fs::symlink(&image, &link).unwrap();
        assert_eq!(path(&link), path(&image));
        assert_eq!(path(&image).file_name().unwrap(), "image.colo-state");
        take_up(std::slice::from_ref(&image), false).unwrap();
        assert!(!path(&image).exists(), "an image that never held a replica needs none");

        fs::write(path(&image), vec![b'x'; 5000]).unwrap();
        assert_eq!(found(&image).unwrap(), Standing::Resync(Why::Unreadable));
        let checkpoint = Standing::Checkpoint { generation: 1, number: 2, session: 0 };
        State::open(Box::new(FileState::of(&link))).unwrap().record(checkpoint).unwrap();
        assert_eq!((found(&image).unwrap(), fs::metadata(path(&image)).unwrap().len()), (checkpoint, 128));

        let behind = take_up(std::slice::from_ref(&image), true).unwrap_err();
        assert!(matches!(behind, StateError::Behind { .. }), "{behind}");
        take_up(std::slice::from_ref(&image), false).unwrap();
        assert_eq!(found(&image).unwrap(), Standing::Guest);
        take_up(std::slice::from_ref(&image), true).unwrap();
        State::open(Box::new(FileState::of(&image))).unwrap().record(Standing::Resync(Why::TakenOver)).unwrap();
        let refused = take_up(std::slice::from_ref(&image), false).unwrap_err().to_string();
        assert!(refused.contains("image is not whole: a guest had taken over on it"), "{refused}");
        assert!(refused.ends_with("save this one before anything else"), "{refused}");
        fs::remove_file(&image).unwrap();
        take_up(std::slice::from_ref(&image), false)
            .expect("the record of an image that is gone says nothing about a new one");
    }

    #[test]
    fn a_record_that_cannot_be_read_is_no_permission() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        fs::create_dir(path(&image)).unwrap();
        fs::write(&image, b"disk").unwrap();
        assert!(matches!(take_up(std::slice::from_ref(&image), false), Err(StateError::Disk(_))));
        assert!(path(Path::new("/dev/null")).starts_with("/dev"), "a character device is none to keep a disk on");
    }

    /// A record of a file that no crash can be in the midst of.
    fn record(dir: &Path, name: &str, standing: Standing, place: Option<Place>) -> PathBuf {
        let image = dir.join(name);
        fs::write(&image, b"disk").unwrap();
        let mut state = State::open(Box::new(FileState::of(&image))).unwrap();
        state.belong(place);
        state.record(standing).unwrap();
        image
    }

    #[test]
    fn several_images_are_taken_up_together_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let at = |number| Standing::Checkpoint { generation: 1, number, session: 0 };
        let place = |set, index, count| Some(Place { set, index, count });
        let make = |name: &str, standing, place| record(dir.path(), name, standing, place);
        let first = make("first", at(5), place(7, 0, 2));
        let second = make("second", at(5), place(7, 1, 2));
        let cases = [
            (
                make("behind", at(4), place(7, 1, 2)),
                "behind is not whole with the guest's other disks: it is whole: checkpoint 4",
            ),
            (make("other", at(5), place(8, 1, 2)), "other is not whole with"),
            (make("third", at(5), place(7, 2, 3)), "it is disk2 of 3 of a checkpoint's, and was named as disk1 of 2"),
            (make("alone", at(5), None), "it is disk0 of 1 of a checkpoint's"),
            (
                make("booted", Standing::Guest, None),
                "it is whole: a guest's own disk, and disk0 is whole: checkpoint 5",
            ),
            (
                make("torn", Standing::Resync(Why::Applying), place(7, 1, 2)),
                "torn is not whole: a checkpoint was being",
            ),
            (dir.path().join("new"), "new is not whole with"),
            (first.clone(), "first is not whole with"),
        ];
        for (image, why) in cases {
            let refused = take_up(&[first.clone(), image], false).unwrap_err().to_string();
            assert!(refused.contains(why), "{refused}");
            assert_eq!(found(&first).unwrap(), at(5), "nothing was written");
        }
        assert!(
            take_up(&[second.clone(), first.clone()], false).unwrap_err().to_string().contains("second is not whole")
        );
        assert!(take_up(std::slice::from_ref(&first), false).unwrap_err().to_string().contains("disk0 of 2"));
        take_up(&[first.clone(), second.clone()], false).unwrap();
        assert_eq!((found(&first).unwrap(), found(&second).unwrap()), (Standing::Guest, Standing::Guest));
        take_up(&[second, first, dir.path().join("new")], true).expect("the disks of a guest are its own to rearrange");
    }
}
