//! Parse and dispatch; nothing else lives here.

use std::process::ExitCode;

fn main() -> ExitCode {
    secateur::cli::main()
}
