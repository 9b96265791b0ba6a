//! What glibc's allocator is told: it knows no safe way to be.

/// Keeps freed memory for the next tensor, from now on; to be called before threads start. By default glibc gives
/// every large block back and faults it in again, which costs a quarter of a forward pass and a third of a
/// training step. For a run that was not told how little memory there is.
pub fn keep_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `mallopt` only sets numbers of the allocator.
    #[allow(unsafe_code)]
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        // Only the main arena keeps what is freed; those of threads are unmapped, and faulted in again.
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Gives every large block back when it is freed, from now on: by default glibc stops doing so for blocks as large
/// as one that was freed before, and what lies between them stays. For a run that was told how little there is.
pub fn return_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `mallopt` only sets numbers of the allocator.
    #[allow(unsafe_code)]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 20);
    }
}

/// Gives what it keeps back to the system.
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: touches free memory only.
    #[allow(unsafe_code)]
    unsafe {
        libc::malloc_trim(0);
    }
}
