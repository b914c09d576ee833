"""What the operator survives: a proxy that makes requests fail, and the operator killed at every
write, against an API server and controllers of the bench's own. Pods are played by a kubelet.
"""
