//! What a process must settle before anything runs: memory, threads, signals.

use std::sync::atomic::{AtomicI32, Ordering};

/// The signal that asked the run to stop; 0 while none has.
static STOP: AtomicI32 = AtomicI32::new(0);

/// Keeps freed memory for the next tensor. By default glibc gives every large
/// block back and faults it in again, which costs a quarter of a forward pass
/// and a third of a training step. `plenty`: nobody said how much memory there is.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn keep_freed_memory(plenty: bool) {
    // SAFETY: `mallopt` only sets two numbers of the allocator; called before threads start.
    #[allow(unsafe_code)]
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        if plenty {
            // Only the main arena keeps what is freed; those of threads are unmapped, and faulted in again.
            // But in one arena small blocks come to lie where large ones were, and it grows.
            libc::mallopt(libc::M_ARENA_MAX, 1);
        }
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn keep_freed_memory(_plenty: bool) {}

/// candle keeps a pool of its own beside rayon's, whose threads wait by spinning: on the cores where rayon
/// works. Its few operations that are left are as fast without.
pub fn one_thread_pool() {
    if std::env::var_os("CANDLE_NUM_THREADS").is_none() {
        // SAFETY: called before any other thread starts, so nobody reads the environment meanwhile.
        #[allow(unsafe_code)]
        unsafe {
            std::env::set_var("CANDLE_NUM_THREADS", "1");
        }
    }
}

/// Computes with at most `threads` threads. candle reads the same variable as rayon.
pub fn limit_threads(threads: usize) {
    // SAFETY: called before any other thread starts, so nobody reads the environment meanwhile.
    #[allow(unsafe_code)]
    unsafe {
        std::env::set_var("RAYON_NUM_THREADS", threads.to_string());
    }
}

/// Ends this process when the worker that started it is gone: nobody hears it any
/// more, and another attempt may be waiting for its workspace. Started by hand it
/// has no supervisor.
pub fn end_with_supervisor() {
    let named = std::env::var("SECATEUR_SUPERVISOR_PID").ok();
    let Some(supervisor) = named.and_then(|pid| pid.parse::<u32>().ok()) else { return };
    std::thread::spawn(move || {
        while std::os::unix::process::parent_id() == supervisor {
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
        let me = rustix::process::getpid();
        rustix::process::kill_process(me, rustix::process::Signal::KILL).ok();
    });
}

extern "C" fn note_signal(signal: i32) {
    STOP.store(signal, Ordering::Relaxed);
}

/// From now on SIGTERM and SIGINT ask to stop at the next seam; a second one kills as usual.
pub fn stop_on_signals() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: the handler only stores to an atomic, which is allowed in a signal handler.
        #[allow(unsafe_code)]
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = note_signal as *const () as usize;
            action.sa_flags = libc::SA_RESETHAND | libc::SA_RESTART;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
    }
}

/// The signal that asked to stop, if any did.
pub fn stop_signal() -> Option<i32> {
    match STOP.load(Ordering::Relaxed) {
        0 => None,
        signal => Some(signal),
    }
}
