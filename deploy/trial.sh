#!/bin/sh
# Make all that the trial in compose.yaml needs: an authority, an identity for each of three hospitals, their policies,
# and made-up notes.
#
# FOR A TRIAL ONLY. Here one container holds every key. Between institutions each makes its key on its own machine, and
# no key travels: docs/certificates.md.
set -eu

if [ -e /trial/server/made ]; then
    echo "The trial's folders are made already. docker compose down --volumes removes them."
    exit 0
fi
rm -rf /trial/*/* /tmp/notes  # what an interrupted start has left

fedlora-server pki init --pki /trial/server/pki --host server
fedlora-simulate notes /tmp/notes
cp /tmp/notes/held-out.jsonl /trial/server/

number=1
for hospital in north south west; do
    tls=/trial/$hospital/tls
    fedlora-client enroll --name "$hospital" --tls "$tls"
    fedlora-server pki sign --pki /trial/server/pki --out "$tls/certificate.pem" "$tls/request.csr"
    cp /trial/server/pki/ca.pem "$tls/"
    cp /opt/trial/policy.toml "/trial/$hospital/"
    cp "/tmp/notes/data/hospital-$number.jsonl" "/trial/$hospital-records/"
    number=$((number + 1))
done
touch /trial/server/made
