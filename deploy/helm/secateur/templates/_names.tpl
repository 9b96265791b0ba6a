{{- define "secateur.name" -}}
{{- printf "%s-%s" .Release.Name "secateur" | trunc 52 | trimSuffix "-" -}}
{{- end }}

{{- define "secateur.labels" -}}
app.kubernetes.io/name: secateur
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* What finds the pods of a part: call with (dict "root" . "part" "api"). */}}
{{- define "secateur.selector" -}}
app.kubernetes.io/name: secateur
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "secateur.store" -}}
{{- .Values.store.existingClaim | default (printf "%s-store" (include "secateur.name" .)) -}}
{{- end }}

{{/* Where finished files are: a volume, or a bucket. */}}
{{- define "secateur.storeEnv" -}}
{{- with .Values.store.s3 }}
{{- if .url }}
- {name: SECATEUR_STORE_URL, value: {{ .url | quote }}}
- {name: AWS_REGION, value: {{ .region | quote }}}
{{- with .endpoint }}
- {name: AWS_ENDPOINT_URL, value: {{ . | quote }}}
{{- end }}
{{- if .proxy }}
- {name: SECATEUR_STORE_PROXY, value: "true"}
{{- end }}
{{- if .secret }}
{{- $secret := .secret }}
{{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ . }}
  valueFrom: {secretKeyRef: {name: {{ $secret | quote }}, key: {{ . }}}}
{{- end }}
{{- end }}
{{- else }}
- {name: SECATEUR_STORE_DIR, value: /store}
{{- end }}
{{- end }}
{{- end }}

{{- define "secateur.storePort" -}}
{{- with .Values.store.s3 }}{{ if and .url (ne (int .port) 443) }}, {port: {{ .port }}, protocol: TCP}{{ end }}{{ end }}
{{- end }}

{{- define "secateur.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "secateur.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "secateur.databaseEnv" -}}
- name: DATABASE_URL
  valueFrom: {secretKeyRef: {name: {{ .Values.database.secret | quote }}, key: {{ .Values.database.key | quote }}}}
{{- end }}

{{/* The pod of a worker: call with (dict "root" . "once" true). */}}
{{- define "secateur.workerPod" -}}
{{- $v := .root.Values }}
serviceAccountName: {{ include "secateur.name" .root }}
automountServiceAccountToken: false
terminationGracePeriodSeconds: {{ $v.worker.graceSeconds }}
securityContext: {{- include "secateur.podSecurity" .root | nindent 2 }}
{{- with $v.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $v.worker.priorityClass }}
priorityClassName: {{ . }}
{{- end }}
{{- with $v.worker.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $v.worker.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
containers:
  - name: worker
    image: "{{ $v.image.worker.repository }}:{{ $v.image.worker.tag | default .root.Chart.AppVersion }}"
    imagePullPolicy: {{ $v.image.worker.pullPolicy }}
    args:
      - worker
      - --device={{ $v.worker.device }}
      {{- if .once }}
      - --once
      - --wait={{ $v.worker.waitSeconds }}
      {{- end }}
    env:
      {{- include "secateur.databaseEnv" .root | nindent 6 }}
      - {name: SECATEUR_DATA_DIR, value: /scratch}
      {{- include "secateur.storeEnv" .root | nindent 6 }}
      - {name: SECATEUR_LOG_FORMAT, value: json}
      - {name: HF_HOME, value: /scratch/hub}
      # Enough to stop at a seam, and still to give the job back before SIGKILL.
      - {name: SECATEUR_STOP_GRACE_MS, value: {{ mul (sub $v.worker.graceSeconds 30) 1000 | quote }}}
      {{- with $v.worker.env }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    securityContext: {{- include "secateur.containerSecurity" .root | nindent 6 }}
    resources: {{- toYaml $v.worker.resources | nindent 6 }}
    volumeMounts:
      - {name: work, mountPath: /scratch}
      {{- if not $v.store.s3.url }}
      - {name: store, mountPath: /store}
      {{- end }}
      - {name: tmp, mountPath: /tmp}
      {{- if $v.models.existingClaim }}
      - {name: models, mountPath: /models, readOnly: true}
      {{- end }}
volumes:
  {{- if not $v.store.s3.url }}
  - name: store
    persistentVolumeClaim: {claimName: {{ include "secateur.store" .root }}}
  {{- end }}
  - name: tmp
    emptyDir: {}
  {{- if $v.models.existingClaim }}
  - name: models
    persistentVolumeClaim: {claimName: {{ $v.models.existingClaim }}, readOnly: true}
  {{- end }}
  {{- if .once }}
  - name: work
    {{- if $v.worker.scratch.storageClass }}
    ephemeral:
      volumeClaimTemplate:
        spec:
          accessModes: [ReadWriteOnce]
          storageClassName: {{ $v.worker.scratch.storageClass }}
          resources: {requests: {storage: {{ $v.worker.scratch.size }}}}
    {{- else }}
    emptyDir: {sizeLimit: {{ $v.worker.scratch.size }}}
    {{- end }}
  {{- end }}
{{- end }}
