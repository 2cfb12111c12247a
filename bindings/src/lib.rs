//! Bindings to the installed Xen libraries, generated when they are built.
