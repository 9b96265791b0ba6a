# A worker on the processor: engine, service and hub.
ARG RUST=rust:1.95-bookworm
ARG DEBIAN=debian:bookworm-slim

FROM ${RUST} AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked \
 && cp target/release/secateur /usr/local/bin/secateur

FROM ${DEBIAN}
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
CMD ["worker"]
