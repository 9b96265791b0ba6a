//! `sqlx::migrate!` reads the directory while compiling; cargo must look there too.

fn main() {
    println!("cargo::rerun-if-changed=migrations");
}
