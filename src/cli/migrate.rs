//! `secateur migrate`.

use std::process::ExitCode;

use super::options::{self, DatabaseArgs};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    database: DatabaseArgs,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    options::runtime()?.block_on(async {
        let database = options::connect(args.database.required()?).await?;
        database.migrate().await?;
        database.close().await;
        anyhow::Ok(())
    })?;
    println!("the database schema is up to date");
    Ok(ExitCode::SUCCESS)
}
