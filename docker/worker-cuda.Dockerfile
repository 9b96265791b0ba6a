# A worker on NVIDIA GPUs. The driver comes from the host (NVIDIA container toolkit).
ARG CUDA=12.6.3
ARG RUST=rust:1.95-bookworm

FROM ${RUST} AS rust

FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS build
# Of the GPUs that are to run it: 80 is A100, 90 H100, 89 L4 and L40.
ARG CUDA_COMPUTE_CAP=80
ENV CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP}
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential pkg-config ca-certificates \
 && rm -rf /var/lib/apt/lists/*
COPY --from=rust /usr/local/cargo /usr/local/cargo
COPY --from=rust /usr/local/rustup /usr/local/rustup
ENV PATH=/usr/local/cargo/bin:${PATH} CARGO_HOME=/usr/local/cargo RUSTUP_HOME=/usr/local/rustup
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --features cuda \
 && cp target/release/secateur /usr/local/bin/secateur

FROM nvidia/cuda:${CUDA}-runtime-ubuntu24.04
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home --home-dir /var/lib/secateur secateur \
 && mkdir -p /var/lib/secateur/data /store \
 && chown -R secateur:secateur /var/lib/secateur /store
COPY --from=build /usr/local/bin/secateur /usr/local/bin/secateur
USER 10001:10001
WORKDIR /var/lib/secateur
ENV SECATEUR_DATA_DIR=/var/lib/secateur/data SECATEUR_STORE_DIR=/store SECATEUR_LOG_FORMAT=json
VOLUME ["/store", "/var/lib/secateur/data"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["secateur"]
CMD ["worker", "--device", "cuda:0"]
