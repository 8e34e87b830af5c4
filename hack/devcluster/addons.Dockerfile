# The small images of a native cluster, where there is no registry to pull them from. One target each; the build context
# holds the programs that `addon_images.py` puts there: built by Go, from a PyPI wheel, or out of Debian's packages.

# Holds a pod's namespaces and reaps its orphans.
FROM scratch AS pause
COPY catatonit /pause
ENTRYPOINT ["/pause", "-P"]

FROM scratch AS coredns
COPY coredns /coredns
ENTRYPOINT ["/coredns"]

FROM scratch AS versitygw
COPY versitygw /usr/local/bin/versitygw
ENV PATH=/usr/local/bin
ENTRYPOINT ["/usr/local/bin/versitygw"]

# Also the image of Envoy's shutdown manager, which Envoy Gateway puts beside each proxy.
FROM scratch AS envoy-gateway
COPY envoy-gateway /usr/local/bin/envoy-gateway
ENV PATH=/usr/local/bin
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/envoy-gateway"]

FROM scratch AS prometheus
COPY prometheus /usr/local/bin/prometheus
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/prometheus"]

# The only one that needs a C library.
FROM scratch AS envoy
COPY libc6/lib /lib
COPY libc6/lib64 /lib64
COPY envoy /usr/local/bin/envoy
ENV PATH=/usr/local/bin
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/envoy"]
