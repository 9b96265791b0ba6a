//! One binary that mirrors the surface; tests are named as sentences.
#![allow(clippy::unwrap_used)]

#[cfg(all(feature = "engine", feature = "service"))]
mod api_artifacts;
#[cfg(all(feature = "engine", feature = "service"))]
mod api_auth;
#[cfg(all(feature = "engine", feature = "service"))]
mod api_bundle;
#[cfg(all(feature = "engine", feature = "service"))]
mod api_doors;
#[cfg(all(feature = "engine", feature = "service"))]
mod api_events;
#[cfg(all(feature = "engine", feature = "service"))]
mod api_http;
#[cfg(all(feature = "engine", feature = "service"))]
mod api_hub;
#[cfg(all(feature = "engine", feature = "service"))]
mod api_jobs;
#[cfg(all(feature = "engine", feature = "service"))]
mod api_limits;
#[cfg(all(feature = "engine", feature = "service"))]
mod api_requests;
#[cfg(all(feature = "engine", feature = "service"))]
mod api_spec;
#[cfg(all(feature = "engine", feature = "service"))]
mod api_sweeps;
#[cfg(all(feature = "engine", feature = "service"))]
mod api_uploads;
#[cfg(feature = "engine")]
mod bad_input;
#[cfg(all(feature = "engine", feature = "service"))]
mod bucket;
#[cfg(feature = "engine")]
mod budget;
#[cfg(all(feature = "engine", feature = "service"))]
mod chaos;
#[cfg(feature = "engine")]
mod checkpoint;
#[cfg(feature = "engine")]
mod choice;
#[cfg(feature = "engine")]
mod corpus;
#[cfg(feature = "engine")]
mod damage;
#[cfg(all(feature = "engine", feature = "service"))]
mod dashboard;
#[cfg(feature = "service")]
mod db;
#[cfg(all(feature = "engine", feature = "service"))]
mod doctor;
#[cfg(feature = "engine")]
mod eval;
mod examples;
#[cfg(all(feature = "engine", feature = "hub"))]
mod fetch;
#[cfg(feature = "engine")]
mod generation;
#[cfg(feature = "engine")]
mod gguf;
#[cfg(feature = "engine")]
mod heal;
#[cfg(feature = "engine")]
mod heal_stage;
#[cfg(feature = "engine")]
mod items;
#[cfg(all(feature = "engine", feature = "service"))]
mod jobs_command;
#[cfg(feature = "service")]
mod lease_model;
#[cfg(feature = "service")]
mod leases;
#[cfg(all(feature = "engine", feature = "service"))]
mod lineage;
#[cfg(feature = "service")]
mod local_pg;
#[cfg(feature = "engine")]
mod memory;
#[cfg(all(feature = "engine", feature = "service"))]
mod mlflow;
#[cfg(all(feature = "engine", feature = "service"))]
mod monitoring;
#[cfg(feature = "service")]
mod openapi;
#[cfg(feature = "engine")]
mod parity;
#[cfg(all(feature = "engine", feature = "service"))]
mod plan;
#[cfg(feature = "engine")]
mod profile;
#[cfg(feature = "engine")]
mod prune;
#[cfg(all(feature = "engine", feature = "service"))]
mod publish;
#[cfg(feature = "engine")]
mod race;
#[cfg(feature = "engine")]
mod repair;
#[cfg(feature = "engine")]
mod report;
#[cfg(feature = "engine")]
mod run;
#[cfg(feature = "engine")]
mod select;
#[cfg(all(feature = "engine", feature = "service"))]
mod service_crash;
mod state;
mod support;
#[cfg(feature = "engine")]
mod sweep;
mod tidy;
#[cfg(feature = "engine")]
mod tiny;
#[cfg(all(feature = "engine", feature = "service"))]
mod traces;
#[cfg(feature = "engine")]
mod verdict;
#[cfg(all(feature = "engine", feature = "service"))]
mod webhooks;
#[cfg(feature = "service")]
mod worker;
#[cfg(feature = "engine")]
mod workspace;
