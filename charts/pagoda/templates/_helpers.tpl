{{- /* Names of objects in a namespace: the release `pagoda` has `pagoda-operator`. */ -}}
{{- define "pagoda.name" -}}
{{- $release := .Release.Name | trunc 46 | trimSuffix "-" -}}
{{- if contains "pagoda" $release }}{{ $release }}-operator{{ else }}{{ $release }}-pagoda-operator{{ end -}}
{{- end }}

{{- /* Names of roles and bindings, which releases of several namespaces share a scope with. */ -}}
{{- define "pagoda.roleName" -}}
{{ include "pagoda.name" . }}.{{ .Release.Namespace }}
{{- end }}

{{- define "pagoda.labels" -}}
app.kubernetes.io/name: pagoda-operator
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "pagoda.selector" -}}
app.kubernetes.io/name: pagoda-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- /* What the operator may do. No secrets, no pods/exec, no wildcard. */ -}}
{{- define "pagoda.rules" -}}
- apiGroups: [pagoda.dev]
  resources: [llmservices]
  verbs: [get, list, watch]
- apiGroups: [pagoda.dev]
  resources: [llmservices/status]
  verbs: [patch]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch, delete]
# Where prometheus-operator is installed.
- apiGroups: [monitoring.coreos.com]
  resources: [podmonitors, prometheusrules]
  verbs: [get, list, create, patch, delete]
- apiGroups: [""]
  resources: [services, serviceaccounts]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch, delete]
- apiGroups: [""]
  resources: [events]
  verbs: [list, watch]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create]
# A second operator is noticed by its Lease.
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  resourceNames: [pagoda-operator, pagoda-operator-cluster]
  verbs: [get, update]
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [create]
{{- end }}
