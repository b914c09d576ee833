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
- apiGroups: [""]
  resources: [services, serviceaccounts]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, delete]
- apiGroups: [""]
  resources: [events]
  verbs: [list]
{{- end }}
