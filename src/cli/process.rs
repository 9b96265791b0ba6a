//! What a process must settle before anything runs: memory, threads, signals.

use std::sync::atomic::{AtomicI32, Ordering};

/// The signal that asked the run to stop; 0 while none has.
static STOP: AtomicI32 = AtomicI32::new(0);

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
