"""The pages: plain HTML that works without JavaScript, some of it live with it."""
