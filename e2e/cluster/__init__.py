"""A Kubernetes of one node on this machine, made of a Go module and Debian packages.

`settings` says where everything is; `packages` and `binaries` get the programs; `pki`,
`configuration` and `components` say how they are started, `network`, `node` and `processes` start
them and clear up; `images` builds Pagoda's images; `lifecycle` puts it in order.
"""
