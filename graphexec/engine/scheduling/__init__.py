"""What runs when: slots, prompt chunks and KV blocks of the requests that are here."""
